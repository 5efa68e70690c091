"""The comparison as a table: the same cells for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastadv.train.phase import ADVERSARIAL, PLAIN


class Line(NamedTuple):
    """One measure of both models."""

    measure: str
    plain: str
    adversarial: str
    difference: str


def method_label(settings: dict[str, Any]) -> str:
    """The method and what it was given, on one line."""
    arguments = ", ".join(f"{name}={value}" for name, value in settings["method_arguments"].items())
    return f"{settings['method']}({arguments})"


def lines(result: dict[str, Any]) -> list[Line]:
    """What the job compares."""
    plain, adversarial = (result["models"][name] for name in (PLAIN, ADVERSARIAL))
    steps = result["settings"]["attack_steps"]
    found = []
    for a, b in zip(plain["accuracy"], adversarial["accuracy"], strict=True):
        points = 100 * (b["accuracy"] - a["accuracy"])
        found.append(Line(measure(a, steps), accuracy(a), accuracy(b), f"{points:+.1f} points"))
    seconds = [model["cost"]["seconds_per_step"] for model in (plain, adversarial)]
    memory = [model["cost"]["peak_memory"] for model in (plain, adversarial)]
    times = [f"{value:.3g} s" for value in seconds]
    found.append(Line("seconds per step, median", times[0], times[1], f"x {seconds[1] / seconds[0]:.2f}"))
    sizes = [size(value) for value in memory]
    found.append(Line("peak memory", sizes[0], sizes[1], f"x {memory[1] / memory[0]:.2f}"))
    return found


def measure(cell: dict[str, Any], steps: int) -> str:
    """What an accuracy is of."""
    if cell["radius"] == 0:
        return f"clean accuracy ({cell['total']:,} samples)"
    return f"under PGD-{steps}, radius {cell['radius']:g} ({cell['total']:,} samples)"


def accuracy(cell: dict[str, Any]) -> str:
    """A share with its 95 % interval."""
    return f"{100 * cell['accuracy']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def size(count: float) -> str:
    """Bytes, readable."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def comparison(result: dict[str, Any]) -> Table:
    """The table that the job ends with."""
    table = _table("accuracy in %, with 95 % intervals", ["", "plain", result["settings"]["method"], "difference"])
    for line in lines(result):
        table.add_row(*line)
    return table


def evaluation(cells: Iterable[dict[str, Any]], steps: int, title: str) -> Table:
    """The table of one model."""
    table = _table(title, ["", "accuracy, 95 % interval"])
    for cell in cells:
        table.add_row(measure(cell, steps), accuracy(cell))
    return table


def sweep(rows: Sequence[dict[str, Any]]) -> Table:
    """One row per setting, means over its seeds."""
    radii = list(rows[0]["accuracy"])
    headings = ["clean" if radius == 0 else f"radius {radius:g}" for radius in radii]
    table = _table("accuracy, mean over seeds", ["setting", "seeds", *headings, "clean - plain", "s per step"])
    for row in rows:
        shares = [f"{100 * row['accuracy'][radius]:.1f} %" for radius in radii]
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        table.add_row(row["setting"], str(len(row["seeds"])), *shares, difference, f"{row['seconds_per_step']:.2f}")
    return table


def methods(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """One row per method, mean and standard deviation over its seeds."""
    table = _table("accuracy, mean ± standard deviation over seeds", headings)
    for row in rows:
        table.add_row(*row)
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=index > 0)
    return table


def show(table: Table) -> None:
    """On standard output; as wide as it needs where that is a file."""
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)
