"""The numbers of a step by moments: see `fastadv.ops.moment_step`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastadv.arguments.rule import MOMENT_BALLS, MOMENT_DIRECTIONS, Rule

# torch.optim's defaults: the decay of the first moment (None: there is none) and of the second, and of the weights.
DEFAULTS = {"adam": (0.9, 0.999, 0.0), "adamw": (0.9, 0.999, 0.01), "rmsprop": (None, 0.99, 0.0)}
GUARD = 1e-8


class Moments(NamedTuple):
    """Delta <- keep delta + rate m / (sqrt(v) / root + guard); what a backend computes with, whatever the direction.

    `first` and `second` are what is left of m and v in a step. Without a first moment, m is the gradient.
    """

    first: float
    second: float
    keep: float
    rate: float
    root: float
    guard: float

    @staticmethod
    def of(rule: Rule, count: int) -> Moments:
        """Those of step `count` (from 1 on) of a search.

        Raises:
            ValueError: a direction that has no moments, or a count below 1.
        """
        if rule.direction not in DEFAULTS:
            rule.check("moment_step", 1, MOMENT_DIRECTIONS)
        if count < 1:
            raise ValueError(f"moment_step: count must be at least 1, the number of the step, not {count}")
        first, second, decay = DEFAULTS[rule.direction]
        keep = 1 - rule.step_size * decay
        if first is None:
            return Moments(0.0, second, keep, rule.step_size, 1.0, GUARD)
        return Moments(first, second, keep, rule.step_size / (1 - first**count), (1 - second**count) ** 0.5, GUARD)


def planes(direction: str) -> int:
    """How many moments an element has: v, or m and v."""
    return 1 if DEFAULTS[direction][0] is None else 2


def check(rule: Rule, delta: Tensor, moments: Tensor | None) -> None:
    """Raises ValueError for a direction or ball that the op has not, or for more or fewer moments than it keeps."""
    rule.check("moment_step", delta.dim(), MOMENT_DIRECTIONS, MOMENT_BALLS)
    many = planes(rule.direction)
    if moments is not None and moments.shape[1:] == delta.shape and len(moments) != many:
        raise ValueError(
            f"moment_step: moments must have shape {(many, *delta.shape)} for {rule.direction!r}, but has "
            f"{tuple(moments.shape)}"
        )
