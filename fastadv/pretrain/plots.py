"""Draw the pictures of the report as SVG text that goes into the page as it is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fastadv.jobs.drawing import COLOURS, on_axes, svg
from fastadv.jobs.folders import ADVERSARIAL, PLAIN
from fastadv.jobs.shown import visible
from fastadv.pretrain.measured import ATTACK, CLEAN
from fastadv.pretrain.settings import LONGER

Points = Sequence[tuple[float, float]]
Rows = Sequence[Mapping[str, Any]]
Trainings = Mapping[str, Mapping[str, Any]]
STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"color": COLOURS["plain"], "ls": "-"},
    LONGER: {"color": COLOURS["plain"], "ls": ":"},
    ADVERSARIAL: {"color": COLOURS["adversarial"], "ls": "-"},
}
NAMES = {PLAIN: "plain", LONGER: "plain, same time"}


def losses(rows: Rows, method: str, against: str) -> str:
    """Draw the loss of each training against `step` or `seconds`, and the adversarial one's at its perturbation."""
    return svg(on_axes(lambda axes: _losses(axes, rows, method, against)), f"losses by {against}")


def radii(trainings: Trainings, method: str, steps: int) -> str:
    """Draw perplexity against the radius of the attack, with 95 % intervals."""
    return svg(on_axes(lambda axes: _radii(axes, trainings, method, steps)), "radii")


def both(rows: Rows, trainings: Trainings, method: str, steps: int) -> str:
    """Draw losses by seconds and perplexities by radius side by side, on white, for a page of its own."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _losses(left, rows, method, "seconds")
        _radii(right, trainings, method, steps)

    return svg(draw, "pretraining", (10.4, 3.8), opaque=True)


def _losses(axes: Axes, rows: Rows, method: str, against: str) -> None:
    method = visible(method)
    curves = [(_points(rows, phase, against, "loss"), STYLES[phase], NAMES.get(phase, method)) for phase in STYLES]
    attacked = {"color": COLOURS["attacked"], "ls": "--"}
    curves.append((_points(rows, ADVERSARIAL, against, "adv_loss"), attacked, f"{method}: at its perturbation"))
    for points, style, name in curves:
        if points:
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), **style, lw=1.6, marker=marker, label=name)
    label = {"step": "optimizer step", "seconds": "seconds of training"}[against]
    axes.set(xlabel=label, ylabel="training loss, nats a token")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend()
    else:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no loss was logged: give a smaller --log-every", ha="center", transform=axes.transAxes)


def _points(rows: Rows, phase: str, against: str, key: str) -> Points:
    """List the points of a curve. A row has the seconds since the one before it."""
    mine = [row for row in rows if row["phase"] == phase]
    seconds = itertools.accumulate(row["seconds"] for row in mine)
    places = seconds if against == "seconds" else (row["step"] for row in mine)
    return [(place, row[key]) for place, row in zip(places, mine, strict=True) if row.get(key) is not None]


def _radii(axes: Axes, trainings: Trainings, method: str, steps: int) -> None:
    ticks: set[float] = set()
    for name, style in STYLES.items():
        if name in trainings:
            cells = [cell for cell in trainings[name]["measured"] if cell["kind"] in (CLEAN, ATTACK)]
            x, y = [cell["size"] for cell in cells], [cell["perplexity"] for cell in cells]
            # An end that rounding puts on the wrong side is at the value.
            below = [max(0.0, cell["perplexity"] - cell["low"]) for cell in cells]
            above = [max(0.0, cell["high"] - cell["perplexity"]) for cell in cells]
            label = NAMES.get(name, visible(method))
            axes.errorbar(x, y, yerr=[below, above], **style, lw=1.6, marker="o", ms=4, capsize=3, label=label)
            ticks.update(x)
    axes.set(xlabel=f"radius of the PGD-{steps} attack, in mean embedding norms", ylabel="held-out perplexity")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(ticks))
    axes.legend()
