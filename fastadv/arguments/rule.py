"""The rule of an ascent: see `fastadv.ops.ascend` and `fastadv.ops.moment_step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# csrc/ascend.h has the same order, those with moments last.
DIRECTIONS = ("l2", "sign", "max")
MOMENT_DIRECTIONS = ("adam", "adamw", "rmsprop")
BALLS = ("l2", "linf", "unit", "none")
MOMENT_BALLS = ("l2", "linf", "none")


class Rule(NamedTuple):
    """One step of length `step_size` in a direction, then onto a ball of radius `epsilon`.

    `group` counts the leading dimensions that index the groups; each group has its own norm.
    """

    step_size: float
    epsilon: float | None
    direction: str
    ball: str
    group: int

    @property
    def bounded(self) -> bool:
        """Whether there is a ball."""
        return self.epsilon is not None and self.ball != "none"

    def check(
        self, op: str, dimensions: int, directions: Sequence[str] = DIRECTIONS, balls: Sequence[str] = BALLS
    ) -> None:
        """Raises ValueError for a direction or ball that the op has not, or a group that `dimensions` do not have."""
        if self.direction not in directions:
            raise ValueError(f"{op}: direction must be one of {', '.join(directions)}, not {self.direction!r}")
        if self.ball not in balls:
            raise ValueError(f"{op}: ball must be one of {', '.join(balls)}, not {self.ball!r}")
        if not 0 <= self.group < dimensions:
            raise ValueError(f"{op}: group must be from 0 to {dimensions - 1}, not {self.group}")
