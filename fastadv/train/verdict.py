"""Say in a few sentences what the numbers of a comparison mean. Every word of them follows from result.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastadv.jobs.conditions import obstacles
from fastadv.jobs.folders import ADVERSARIAL, PLAIN
from fastadv.train import cells
from fastadv.train.cells import Cell
from fastadv.train.metrics import score
from fastadv.train.paired import Difference, difference

SAME = 0.02  # an interval within two points of zero: the accuracy stays
MUCH = 0.05  # of clean accuracy lost
FAR = " That is far: the attack is too strong for this model. Take a smaller radius (--epsilon)."
BLUNT = 0.05  # an interval that reaches further from its middle sees large differences only


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Sum a comparison up: what happened without an attack, what the attack shows, what it cost."""
    plain, adversarial = (result["models"][name] for name in (PLAIN, ADVERSARIAL))
    collapsed = _collapsed(result)
    if collapsed:
        return [collapsed, cost(result)]
    (clean, *attacked), (others, *others_attacked) = (model["accuracy"] for model in (plain, adversarial))
    pairs = list(zip(attacked, others_attacked, strict=True))
    return [
        _clean(clean, others),
        _attacked(pairs, result["settings"]["method"]),
        *_blunt([(clean, others), *pairs]),
        cost(result),
    ]


def _collapsed(result: Mapping[str, Any]) -> str | None:
    """Say that a model answers one class: no attack can turn it, so its accuracy under attack is no robustness."""
    for phase, name, cure in (
        (PLAIN, "plain training", "train longer, or with another --learning-rate"),
        (ADVERSARIAL, result["settings"]["method"], "try a smaller radius"),
    ):
        answer = result["models"][phase].get("only_answer")
        if answer is not None:
            return (
                f"The model of {name} answers {answer!r} whatever it reads. It has learned nothing, and its accuracy "
                f"under attack is no robustness: {cure}."
            )
    return None


def _clean(plain: Cell, adversarial: Cell) -> str:
    found = difference(plain, adversarial)
    start = f"Clean {cells.name(plain)}"
    values = f"{cells.value(adversarial)}, and {cells.value(plain)} with plain training"
    shown = f"({_unit(plain, cells.gap(plain, adversarial))})"
    if found is None:
        return f"{start} is {values} {shown}; how sure that is, this result does not tell."
    if found.low > 0:
        return f"{start} rises: {values} {shown}."
    if found.high < 0:
        return f"{start} falls: {values} {shown}.{FAR if cells.is_share(plain) and found.value < -MUCH else ''}"
    if max(-found.low, found.high) <= SAME:
        return f"{start} stays: {values} {shown}."
    return f"{start} shows no sure difference: {values} {shown}."


def _attacked(pairs: Sequence[tuple[Cell, Cell]], method: str) -> str:
    """The smallest radius in words, the others by their numbers."""
    (plain, adversarial), *rest = pairs
    start = f"Under the embedding attack of radius {plain['radius']:g}"
    if max(score(plain), score(adversarial)) <= 0:
        return f"{start} neither model is right on any sample: measure at smaller radii (--radii)."
    more = [f"at radius {a['radius']:g}: {_unit(a, cells.gap(a, b))}" for a, b in rest]
    return "; ".join([f"{start} {_change(plain, adversarial, method)}", *more]) + "."


def _change(plain: Cell, adversarial: Cell, method: str) -> str:
    found = difference(plain, adversarial)
    shown = _unit(plain, cells.gap(plain, adversarial))
    what = (
        f"{cells.name(plain)} is {cells.value(adversarial)} with {method}, and {cells.value(plain)} without ({shown})"
    )
    if found is None:
        return what
    if found.low > 0:
        return f"{method} gains: {what}"
    if found.high < 0:
        return f"{method} loses: {what}"
    return f"no gain is sure: {what}"


def _blunt(pairs: Sequence[tuple[Cell, Cell]]) -> list[str]:
    """Warn of intervals so wide that "no gain" says little."""
    found = [(one, a) for a, b in pairs if (one := difference(a, b)) is not None]
    if not found:
        return []
    widest, cell = max(found, key=lambda one: _reach(one[0]))
    if _reach(widest) <= BLUNT:
        return []
    reach = f"{100 * _reach(widest):.0f} points" if cells.is_share(cell) else f"{_reach(widest):.2f}"
    return [f"With {widest.samples:,} test samples only differences above some {reach} show."]


def _reach(found: Difference) -> float:
    return (found.high - found.low) / 2


def cost(result: Mapping[str, Any]) -> str:
    """Say how much longer a step takes, or why that is not known."""
    plain, adversarial = (result["models"][name]["cost"] for name in (PLAIN, ADVERSARIAL))
    reasons = obstacles(plain, adversarial)
    if reasons:
        return f"The times of the steps are not compared: {' and '.join(reasons)}."
    return f"A step takes {adversarial['seconds_per_step'] / plain['seconds_per_step']:.1f} times as long."


def _unit(cell: Cell, shown: str) -> str:
    """Put the unit after a difference, before its interval."""
    if not cells.is_share(cell):
        return shown
    first, space, rest = shown.partition(" ")
    return f"{first} points{space}{rest}"
