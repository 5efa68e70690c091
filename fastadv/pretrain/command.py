"""Define `fastadv pretrain`: its options are the fields of `Settings`. No torch before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from fastadv.pretrain import settings as declared
from fastadv.pretrain.settings import Settings

RUNS = Path("runs/pretrain")  # beside those of `fastadv train`, whose --resume looks in runs/ alone
RUN = "Run"


class Pretrain(TyperCommand):
    """List the options under their headings, and those that come with the methods below."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            group = declared.options().get(parameter.name or "", {}).get("group", RUN)
            if record is not None:
                groups.setdefault(group, []).append(record)
        for group in sorted(groups, key=lambda one: one == RUN):
            with formatter.section(group):
                formatter.write_dl(groups[group])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        r"""Write the list; `\b` keeps click from filling a paragraph."""
        from fastadv.pretrain import options

        self.epilog = "\b\n" + options.listing()
        super().format_epilog(ctx, formatter)


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for every field of `Settings`, and pass what they hold on as `given`."""
    hints = get_type_hints(Settings)
    theirs = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(Settings, name),
            annotation=Annotated[hints[name], typer.Option(help=one["help"])],
        )
        for name, one in declared.options().items()
    ]

    def run(**values: Any) -> None:
        command(given={one.name: values.pop(one.name) for one in theirs}, **values)

    mine = [
        one.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for one in inspect.signature(command, eval_str=True).parameters.values()
        if one.name != "given"
    ]
    run.__dict__.update(__signature__=inspect.Signature([*theirs, *mine]))  # which typer reads
    run.__annotations__ = {one.name: one.annotation for one in (*theirs, *mine)}
    run.__doc__, run.__name__ = command.__doc__, command.__name__
    return run
