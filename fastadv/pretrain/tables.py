"""Lay out a result as a table: the same cells for the terminal and the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastadv.jobs.folders import ADVERSARIAL, PLAIN
from fastadv.jobs.shown import visible
from fastadv.pretrain.intervals import Interval, ratio
from fastadv.pretrain.measured import ATTACK, CLEAN
from fastadv.pretrain.settings import LONGER

Cell = Mapping[str, Any]


def columns(result: Mapping[str, Any]) -> dict[str, Cell]:
    """List the trainings of a run by the headings of their columns, the adversarial one last."""
    titles = {PLAIN: "plain", LONGER: "plain, same time", ADVERSARIAL: result["settings"]["method_name"]}
    return {title: result["trainings"][name] for name, title in titles.items() if name in result["trainings"]}


def plain_ones(result: Mapping[str, Any]) -> dict[str, Cell]:
    """List the trainings that the adversarial one is compared with; without it there is no comparison."""
    if ADVERSARIAL not in result["trainings"]:
        return {}
    *found, _ = columns(result).items()
    return dict(found)


def title(result: Mapping[str, Any]) -> str:
    """Say what the table has."""
    documents = next(iter(columns(result).values()))["measured"][0]["documents"]
    return f"perplexity of {documents:,} held-out documents, with 95 % intervals"


def headings(result: Mapping[str, Any]) -> list[str]:
    """Name the columns: the trainings, and what the adversarial one's perplexities are divided by."""
    return ["", *columns(result), *(f"over {title.removeprefix('plain, ')}" for title in plain_ones(result))]


def lines(result: Mapping[str, Any]) -> list[list[str]]:
    """List the perplexities of a run, a cell for each heading."""
    found, others = list(columns(result).values()), list(plain_ones(result).values())
    rows = []
    for index, cell in enumerate(found[0]["measured"]):
        cells = [one["measured"][index] for one in found]
        ratios = [times(ratio(one["measured"][index], cells[-1])) for one in others]
        rows.append([measure(cell, result["settings"]), *map(with_interval, cells), *ratios])
    return rows


def costs(result: Mapping[str, Any]) -> list[list[str]]:
    """List what the trainings took, a cell for each."""
    shown = {
        "steps": ("optimizer steps", "{:,.0f}", 1),
        "tokens": ("tokens", "{:,.0f}", 1),
        "seconds": ("training", "{:,.0f} s", 1),
        "seconds_per_token": ("time per token", "{:,.1f} µs", 1e6),
        "attack_share": ("share of the attack", "{:.0f} %", 100),
        "peak_memory": ("peak memory", "{:,.0f} MB", 1e-6),
    }
    found = [one["cost"] for one in columns(result).values()]
    return [[name, *(form.format(scale * one[key]) for one in found)] for key, (name, form, scale) in shown.items()]


def measure(cell: Cell, settings: Mapping[str, Any]) -> str:
    """Name a measure."""
    if cell["kind"] == CLEAN:
        return "on held-out text"
    if cell["kind"] == ATTACK:
        return f"PGD-{settings['attack_steps']}, radius {cell['size']:g}"
    return f"{100 * cell['size']:g} % of letters misspelt"


def with_interval(cell: Cell) -> str:
    """Format a perplexity with its interval."""
    return f"{number(cell['perplexity'])} [{number(cell['low'])}, {number(cell['high'])}]"


def times(found: Interval) -> str:
    """Format a ratio with its interval."""
    return f"x {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def number(value: float) -> str:
    """Format a perplexity: three digits, and whole numbers in full."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def show(result: Mapping[str, Any]) -> None:
    """Print the tables of a run; 120 columns wide where the output is no terminal."""
    console = Console()
    console = Console(width=None if console.is_terminal else 120)
    console.print(_table(title(result), headings(result), lines(result)))
    console.print(_table("what the trainings took", ["", *columns(result)], costs(result)))


def _table(heading: str, named: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=heading, title_justify="left", title_style="dim")
    for index, name in enumerate(named):
        table.add_column(Text(visible(name)), justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(visible(one)) for one in row))
    return table
