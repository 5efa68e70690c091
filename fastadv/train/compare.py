"""Compare methods: train with each and several seeds on one data set; a table, a picture and the numbers."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastadv.integrations import files
from fastadv.jobs import method_options, signatures
from fastadv.jobs.errors import Interrupted
from fastadv.jobs.shown import visible
from fastadv.jobs.writable import check_files
from fastadv.train import plots
from fastadv.train.job import Settings
from fastadv.train.kept import Kept, Point, check
from fastadv.train.metrics import score
from fastadv.train.sweep import common, label, points, ready, train_all

RESULT, PICTURE, TABLE = "compare.json", "compare.svg", "compare.md"
_MARKUP = re.compile(r"[|<>&`*\[\]\\$~]")


class Spread(NamedTuple):
    """Mean and standard deviation of a measure over the seeds."""

    mean: float
    deviation: float  # of the sample; 0 for one seed
    values: list[float]


class Row(NamedTuple):
    """Hold the measures of one setting of a method."""

    setting: str
    seeds: list[int]
    accuracy: dict[float, Spread]  # by radius, the clean one at 0
    difference: Spread | None  # of clean accuracy to plain training's, seed by seed
    seconds: Spread
    memory: Spread | None


def grid_of(names: str, tries: Sequence[str]) -> list[Point]:
    """List plain training, the named methods ("all": every one) at this job's defaults, and the settings of --try.

    Raises:
        UserError: there is no such method, or it has no such parameter.
    """
    chosen = (
        list(signatures.methods()) if names == "all" else [name.strip() for name in names.split(",") if name.strip()]
    )
    named: list[Point] = [("plain", {})]
    for name in chosen:
        if name.lower() != "plain":
            method_options.signature_of(name)
            named.append((name.lower(), {}))
    return [*named, *(point for point in points(tries) if point not in named)]


def run(settings: Settings, grid: Sequence[Point], seeds: Sequence[int], folder: Path, command: str) -> dict[str, Any]:
    """Train and measure the settings that `folder` does not hold yet; then write its table and its picture.

    Raises:
        UserError: `folder` holds a comparison on other data, or with other settings; or cannot be written to.
        Interrupted: stopped by its user; trainings that are finished are kept.
    """
    check_files(folder, [RESULT, TABLE, PICTURE])
    check(folder / RESULT)
    job = ready(settings, grid)
    try:
        train_all(job, grid, seeds, folder / RESULT, command)
    except (KeyboardInterrupt, Interrupted):
        raise Interrupted(f"stopped; the same command goes on, without the trainings in {folder / RESULT}") from None

    def last(result: dict[str, Any]) -> None:
        result["command"] = command  # the last of several, which asked for all that is there
        write(result, folder)

    return Kept(folder / RESULT, command, common(job)).update(last)


def write(result: dict[str, Any], folder: Path) -> list[Row]:
    """Write the table and the picture of the trainings so far."""
    rows = summary(result["runs"])
    files.write(folder / TABLE, markdown(rows))
    files.write(folder / PICTURE, plots.methods(rows))
    return rows


def summary(runs: Iterable[dict[str, Any]]) -> list[Row]:
    """Summarise each setting in a row: plain training first, then by name."""
    runs = sorted(runs, key=lambda one: (one["method"] != "plain", one["method"]))
    plain = {one["seed"]: score(one["accuracy"][0]) for one in runs if one["method"] == "plain"}
    rows = []
    for name in dict.fromkeys(label(one["method"], one["arguments"]) for one in runs):
        mine = [one for one in runs if label(one["method"], one["arguments"]) == name]
        differences = [score(one["accuracy"][0]) - plain[one["seed"]] for one in mine if one["seed"] in plain]
        radii = [cell["radius"] for cell in mine[0]["accuracy"]]
        memory = [one["peak_memory"] for one in mine if "peak_memory" in one]
        rows.append(
            Row(
                name,
                [one["seed"] for one in mine],
                {radius: _spread([score(one["accuracy"][i]) for one in mine]) for i, radius in enumerate(radii)},
                _spread(differences) if differences and mine[0]["method"] != "plain" else None,
                _spread([one["seconds_per_step"] for one in mine]),
                _spread(memory) if memory else None,
            )
        )
    return rows


def _spread(values: Sequence[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation, list(values))


def headings(rows: Sequence[Row]) -> list[str]:
    """Name the columns of the table."""
    radii = ["clean, %" if radius == 0 else f"radius {radius:g}, %" for radius in rows[0].accuracy]
    return ["method", "seeds", *radii, "clean - plain", "s per step", "peak memory"]


def cells(row: Row) -> list[str]:
    """Format a row of the table: mean ± standard deviation over the seeds."""
    shares = [_percent(spread) for spread in row.accuracy.values()]
    difference = "" if row.difference is None else f"{100 * row.difference.mean:+.1f}"
    memory = "" if row.memory is None else _size(row.memory.mean)
    return [row.setting, str(len(row.seeds)), *shares, difference, f"{row.seconds.mean:.2f}", memory]


def _percent(spread: Spread) -> str:
    shown = f"{100 * spread.mean:.1f}"
    return f"{shown} ± {100 * spread.deviation:.1f}" if len(spread.values) > 1 else shown


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def markdown(rows: Sequence[Row]) -> str:
    """Format the table in Markdown."""
    named = headings(rows)
    lines = [map(_escaped, named), ["---"] * len(named), *(map(_escaped, cells(row)) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _escaped(cell: str) -> str:
    """Keep what a name holds from being Markdown or HTML."""
    return _MARKUP.sub(lambda found: html.escape(found[0]) if found[0] in "<>&" else "\\" + found[0], visible(cell))
