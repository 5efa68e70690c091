"""Define `fastadv pretrain`: its options are the fields of `Settings`. No torch before it runs."""

from __future__ import annotations

import inspect
import os
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from fastadv.jobs import names
from fastadv.jobs.errors import UserError
from fastadv.pretrain import methods
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
        self.epilog = "\b\n" + listing()
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


def listing() -> str:
    """List the methods with their parameters, for `fastadv pretrain --help`."""
    lines = ["Parameters of the methods, with their defaults in this job:"]
    for name in methods.DEFAULTS:
        # "\xa0" keeps an option and its value on one line.
        shown = [f"{names.option(key)}\xa0{value}" for key, value in methods.parameters(name).items()]
        text = textwrap.fill(
            f"{name}: {', '.join(shown)}", 76, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
        )
        lines += text.replace("\xa0", " ").splitlines()
    return "\n".join(lines)


@_with_settings
def pretrain(
    context: typer.Context,
    given: dict[str, Any],
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the run. Default: runs/pretrain/DATE-TIME.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an unfinished run: the latest, or --output-dir's.")
    ] = False,
) -> None:
    """Pretrain a language model plainly and adversarially, and compare the two.

    Ends with a table, and writes result.json, report.html, log.jsonl and the models to the run's folder. A method's
    parameters are options too, by their own names. Ctrl-C saves a checkpoint; --resume goes on. For several processes:
    torchrun --nproc-per-node 2 -m fastadv pretrain ...
    """
    if resume:
        names.only(context, "resume", "output_dir")
        chosen = None
    else:
        chosen = Settings(**given, extra=tuple(context.args))
        chosen = replace(chosen, method=chosen.method.lower())
        check(chosen, [*given, "output_dir", "resume"])
    from fastadv.pretrain import run

    run.in_processes(chosen, output_dir, RUNS, context.obj)


def check(settings: Settings, own: list[str]) -> None:
    """Look through all options before anything is read or loaded.

    Raises:
        UserError: one is wrong. Every process finds the same, and the first one says it.
    """
    try:
        declared.check(settings)
        methods.arguments(settings.method, settings.extra, own)
    except UserError:
        if int(os.environ.get("RANK", "0")):
            raise SystemExit(2) from None
        raise
