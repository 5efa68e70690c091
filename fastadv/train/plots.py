"""Draw the pictures of the reports as SVG text that goes into a page as it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastadv.jobs.drawing import COLOURS, on_axes, svg
from fastadv.jobs.shown import visible
from fastadv.train import cells
from fastadv.train.metrics import score


def losses(rows: Sequence[dict[str, Any]], method: str) -> str:
    """Draw training losses against steps: of both trainings, and the adversarial loss of the second."""
    method = visible(method)

    def draw(axes: Axes) -> None:
        highest = 0.0
        for phase, key, colour, style, name in (
            ("plain", "loss", COLOURS["plain"], "-", "plain training"),
            ("adversarial", "loss", COLOURS["adversarial"], "-", f"{method}: without perturbation"),
            ("adversarial", "adv_loss", COLOURS["attacked"], "--", f"{method}: at its perturbation"),
        ):
            points = [(row["step"], row[key]) for row in rows if row["phase"] == phase and key in row]
            if points:
                marker = "o" if len(points) == 1 else None
                axes.plot(*zip(*points, strict=True), color=colour, ls=style, lw=1.6, marker=marker, label=name)
                highest = max([highest, *(loss for _, loss in points if math.isfinite(loss))])
        axes.set(xlabel="step", ylabel="training loss")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.lines:
            axes.set_ylim(0, 1.1 * highest or 1)
            axes.legend()
        else:
            axes.set(xticks=[], yticks=[])
            note = "no loss was logged: give a smaller --logging-steps"
            axes.text(0.5, 0.5, note, ha="center", transform=axes.transAxes)

    return svg(on_axes(draw), "losses")


def radii(models: dict[str, Sequence[dict[str, Any]]], steps: int) -> str:
    """Draw accuracy against the radius of the attack, with 95 % intervals."""

    def draw(axes: Axes) -> None:
        first = next(iter(models.values()))[0]
        scale = 100 if cells.is_share(first) else 1
        for index, (name, measured) in enumerate(models.items()):
            x = [cell["radius"] for cell in measured]
            y = [scale * score(cell) for cell in measured]
            # An end that rounding puts on the wrong side is at the value.
            below = [max(0.0, scale * (score(cell) - cell["low"])) for cell in measured]
            above = [max(0.0, scale * (cell["high"] - score(cell))) for cell in measured]
            colour = (COLOURS["plain"], COLOURS["adversarial"])[index % 2]
            if len(models) == 1:
                colour = COLOURS["adversarial"]
            style: dict[str, Any] = {"lw": 1.6, "marker": "o", "ms": 4, "capsize": 3, "label": visible(name)}
            axes.errorbar(x, y, yerr=[below, above], color=colour, **style)
        axes.set(xlabel=f"radius of the PGD-{steps} attack (l2 norm per sample)", ylabel=cells.name(first))
        if cells.is_share(first):
            axes.set_ylabel("accuracy, %")
            axes.set_ylim(0, 102)
        axes.set_xticks(sorted({cell["radius"] for measured in models.values() for cell in measured}))
        axes.legend()

    return svg(on_axes(draw), "radii")


def methods(rows: Sequence[Any]) -> str:
    """Draw a line per method: clean and attacked accuracy of each seed and their mean, and the time of a step."""
    names = [visible(row.setting) for row in rows]
    radii = list(rows[0].accuracy)
    panels = [("clean accuracy" if radius == 0 else f"under attack, radius {radius:g}", "%") for radius in radii]
    panels.append(("time of a step", "s"))

    def draw(figure: Figure) -> None:
        for index, (axes, (title, unit)) in enumerate(
            zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True)
        ):
            spreads = [row.accuracy[radii[index]] if index < len(radii) else row.seconds for row in rows]
            scale = 100 if unit == "%" else 1
            axes.axvline(scale * spreads[0].mean, color=COLOURS["plain"], lw=1, ls=":")
            for y, spread in enumerate(spreads):
                colour = COLOURS["plain"] if y == 0 else COLOURS["adversarial"]
                axes.plot([scale * value for value in spread.values], [y] * len(spread.values), "o", color=colour, ms=3,
                          alpha=0.45)  # fmt: skip
                axes.plot([scale * spread.mean], [y], "|", color=colour, ms=14, mew=2)
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(unit)
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis() if index == 0 else None

    return svg(draw, "methods", (9.6, 1.2 + 0.3 * len(rows)))
