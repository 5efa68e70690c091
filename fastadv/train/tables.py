"""Lay out results as tables: the same cells for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastadv.jobs.conditions import obstacles
from fastadv.jobs.folders import ADVERSARIAL, PLAIN
from fastadv.jobs.shown import visible
from fastadv.train import cells
from fastadv.train.cells import Cell
from fastadv.train.paired import difference


class Line(NamedTuple):
    """Hold one measure of both models."""

    measure: str
    plain: str
    adversarial: str
    difference: str


def method_label(settings: Mapping[str, Any]) -> str:
    """Spell the method and its arguments on one line."""
    arguments = ", ".join(f"{name}={value}" for name, value in settings["method_arguments"].items())
    return f"{settings['method']}({arguments})"


def difference_heading(result: Mapping[str, Any]) -> str:
    """Name the column of differences, with the unit of the first lines."""
    return "difference, points" if cells.is_share(result["models"][PLAIN]["accuracy"][0]) else "difference"


def intervals(first: Cell, second: Cell) -> str:
    """Name the methods that made the intervals of two cells."""
    alone, paired = ("Wilson's", "Newcombe's") if cells.is_share(first) else ("Fisher's", "Zou's")
    if difference(first, second) is None:
        return f"by {alone} formula"
    return f"by {alone} formula and, of differences on the same samples, by {paired} for pairs"


def lines(result: Mapping[str, Any]) -> list[Line]:
    """List the measures of a comparison."""
    plain, adversarial = (result["models"][name] for name in (PLAIN, ADVERSARIAL))
    steps = result["settings"]["attack_steps"]
    pairs = list(zip(plain["accuracy"], adversarial["accuracy"], strict=True))
    found = [Line(measure(a, steps), cells.with_interval(a), cells.with_interval(b), cells.gap(a, b)) for a, b in pairs]
    found += _more(*pairs[0])
    costs = [model["cost"] for model in (plain, adversarial)]
    seconds, memory = ([cost[key] for cost in costs] for key in ("seconds_per_step", "peak_memory"))
    times = [f"{value:.3g} s" for value in seconds]
    ratio = "not compared" if obstacles(*costs) else f"x {seconds[1] / seconds[0]:.2f}"
    found.append(Line("seconds per step, median", times[0], times[1], ratio))
    sizes = [size(value) for value in memory]
    found.append(Line("peak memory", sizes[0], sizes[1], f"x {memory[1] / memory[0]:.2f}"))
    return found


def _more(plain: Cell, adversarial: Cell) -> list[Line]:
    """List what else is known of clean answers."""
    known = {"f1": "clean F1, macro", "f1_micro": "clean F1, micro", "mse": "clean mean squared error"}
    return [
        Line(name, f"{plain[key]:.3f}", f"{adversarial[key]:.3f}", f"{adversarial[key] - plain[key]:+.3f}")
        for key, name in known.items()
        if key in plain
    ]


def measure(cell: Cell, steps: int) -> str:
    """Name a measure."""
    if cell["radius"] == 0:
        return f"clean {cells.name(cell)} ({cell['total']:,} samples)"
    return f"under PGD-{steps}, radius {cell['radius']:g} ({cell['total']:,} samples)"


def size(count: float) -> str:
    """Format bytes."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def comparison(result: Mapping[str, Any]) -> Table:
    """Make the table that `fastadv train` ends with."""
    first = result["models"][PLAIN]["accuracy"][0]
    headings = ["", "plain", result["settings"]["method"], difference_heading(result)]
    table = _table(f"{cells.name(first)}, with 95 % intervals", headings)
    for line in lines(result):
        table.add_row(*map(cell, line))
    return table


def evaluation(result: dict[str, Any]) -> Table:
    """Make the table of the models of an evaluation."""
    found = result["models"]
    first = next(iter(found.values()))["accuracy"]
    table = _table(f"{result['folder']}: {cells.name(first[0])}, 95 % intervals", ["", *found])
    for row in zip(*(model["accuracy"] for model in found.values()), strict=True):
        table.add_row(*map(cell, [measure(row[0], result["attack"]["steps"]), *map(cells.with_interval, row)]))
    return table


def sweep(rows: Sequence[dict[str, Any]]) -> Table:
    """Make the table of a sweep: a row per setting, means over its seeds."""
    radii = list(rows[0]["accuracy"])
    headings = ["clean" if radius == 0 else f"radius {radius:g}" for radius in radii]
    table = _table("accuracy, mean over seeds", ["setting", "seeds", *headings, "clean - plain", "s per step"])
    for row in rows:
        shares = [f"{100 * row['accuracy'][radius]:.1f} %" for radius in radii]
        difference = "" if row["difference"] is None else f"{100 * row['difference']:+.1f}"
        shown = [row["setting"], len(row["seeds"]), *shares, difference, f"{row['seconds_per_step']:.2f}"]
        table.add_row(*map(cell, shown))
    return table


def methods(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Make the table of a comparison: a row per method, mean and standard deviation over its seeds."""
    table = _table("accuracy, mean ± standard deviation over seeds", headings)
    for row in rows:
        table.add_row(*map(cell, row))
    return table


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=cell(title), title_justify="left", title_style="dim")
    for index, heading in enumerate(headings):
        table.add_column(cell(heading), justify="right" if index else "left", no_wrap=index > 0)
    return table


def cell(text: object) -> Text:
    """Make a cell of a name as it is: what rich takes for markup, and what moves a terminal, is text here."""
    return Text(visible(text))


def show(table: Table) -> None:
    """Print a table; 120 columns wide where the output is no terminal."""
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)
