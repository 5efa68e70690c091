"""Lay out results as tables: the same cells for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastadv.train.folders import ADVERSARIAL, PLAIN
from fastadv.train.metrics import score


class Line(NamedTuple):
    """Hold one measure of both models."""

    measure: str
    plain: str
    adversarial: str
    difference: str


def method_label(settings: dict[str, Any]) -> str:
    """Spell the method and its arguments on one line."""
    arguments = ", ".join(f"{name}={value}" for name, value in settings["method_arguments"].items())
    return f"{settings['method']}({arguments})"


def lines(result: dict[str, Any]) -> list[Line]:
    """List the measures of a comparison."""
    plain, adversarial = (result["models"][name] for name in (PLAIN, ADVERSARIAL))
    steps = result["settings"]["attack_steps"]
    found = []
    for a, b in zip(plain["accuracy"], adversarial["accuracy"], strict=True):
        gap = score(b) - score(a)
        difference = f"{100 * gap:+.1f} points" if "accuracy" in a else f"{gap:+.3f}"
        found.append(Line(measure(a, steps), accuracy(a), accuracy(b), difference))
    seconds = [model["cost"]["seconds_per_step"] for model in (plain, adversarial)]
    memory = [model["cost"]["peak_memory"] for model in (plain, adversarial)]
    times = [f"{value:.3g} s" for value in seconds]
    found.append(Line("seconds per step, median", times[0], times[1], f"x {seconds[1] / seconds[0]:.2f}"))
    sizes = [size(value) for value in memory]
    found.append(Line("peak memory", sizes[0], sizes[1], f"x {memory[1] / memory[0]:.2f}"))
    return found


def measure(cell: dict[str, Any], steps: int) -> str:
    """Name an accuracy."""
    if cell["radius"] == 0:
        return f"clean {cell.get('metric', 'accuracy')} ({cell['total']:,} samples)"
    return f"under PGD-{steps}, radius {cell['radius']:g} ({cell['total']:,} samples)"


def accuracy(cell: dict[str, Any]) -> str:
    """Format an accuracy, or a correlation, with its 95 % interval."""
    if "accuracy" not in cell:
        return f"{score(cell):.3f} [{cell['low']:.3f}, {cell['high']:.3f}]"
    return f"{100 * cell['accuracy']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]"


def size(count: float) -> str:
    """Format bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def comparison(result: dict[str, Any]) -> Table:
    """Make the table that `fastadv train` ends with."""
    table = _table("accuracy in %, with 95 % intervals", ["", "plain", result["settings"]["method"], "difference"])
    for line in lines(result):
        table.add_row(*line)
    return table


def evaluation(result: dict[str, Any]) -> Table:
    """Make the table of the models of an evaluation."""
    table = _table(f"{result['folder']}, with 95 % intervals", ["", *result["models"]])
    for cells in zip(*(model["accuracy"] for model in result["models"].values()), strict=True):
        table.add_row(measure(cells[0], result["attack"]["steps"]), *map(accuracy, cells))
    return table


def sweep(rows: Sequence[dict[str, Any]]) -> Table:
    """Make the table of a sweep: a row per setting, means over its seeds."""
    radii = list(rows[0]["accuracy"])
    headings = ["clean" if radius == 0 else f"radius {radius:g}" for radius in radii]
    table = _table("accuracy, mean over seeds", ["setting", "seeds", *headings, "clean - plain", "s per step"])
    for row in rows:
        shares = [f"{100 * row['accuracy'][radius]:.1f} %" for radius in radii]
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        table.add_row(row["setting"], str(len(row["seeds"])), *shares, difference, f"{row['seconds_per_step']:.2f}")
    return table


def methods(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Make the table of a comparison: a row per method, mean and standard deviation over its seeds."""
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
    """Print a table; 120 columns wide where the output is no terminal."""
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)
