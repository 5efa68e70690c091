"""Write the measures of result.json as a reader wants them: accuracies in %, correlations as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadv.train.metrics import score
from fastadv.train.paired import Difference, difference

Cell = Mapping[str, Any]
NAMES = {"accuracy": "accuracy", "pearson": "Pearson's r"}


def is_share(cell: Cell) -> bool:
    """Tell whether the measure is a share of samples."""
    return bool(cell.get("metric", "accuracy") == "accuracy")


def name(cell: Cell) -> str:
    """Name the measure."""
    return NAMES[cell.get("metric", "accuracy")]


def value(cell: Cell) -> str:
    """Format the measure."""
    return f"{100 * score(cell):.1f} %" if is_share(cell) else f"{score(cell):.3f}"


def with_interval(cell: Cell) -> str:
    """Format the measure with its 95 % interval."""
    low, high = (f"{100 * cell[end]:.1f}" if is_share(cell) else f"{cell[end]:.3f}" for end in ("low", "high"))
    return f"{value(cell)} [{low}, {high}]"


def gap(plain: Cell, adversarial: Cell) -> str:
    """Format the difference of two models, with its interval where it is known."""
    found = difference(plain, adversarial)
    return number(score(adversarial) - score(plain), plain) if found is None else interval(found, plain)


def interval(found: Difference, cell: Cell) -> str:
    """Format a difference with its interval. `cell`: one of the two."""
    return f"{number(found.value, cell)} [{number(found.low, cell)}, {number(found.high, cell)}]"


def number(gap_: float, cell: Cell) -> str:
    """Format a difference of shares in points, of others as it is."""
    return f"{100 * gap_:+.1f}" if is_share(cell) else f"{gap_:+.3f}"
