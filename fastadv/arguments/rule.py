"""The rule of an ascent: see `fastadv.ops.ascend`."""

from __future__ import annotations

from typing import NamedTuple

# csrc/ascend.h has the same order.
DIRECTIONS = ("l2", "sign", "max")
BALLS = ("l2", "linf", "unit", "none")


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

    def check(self, op: str, dimensions: int) -> None:
        """Raises ValueError for a direction or ball that does not exist, or a group that `dimensions` do not have."""
        if self.direction not in DIRECTIONS:
            raise ValueError(f"{op}: direction must be one of {', '.join(DIRECTIONS)}, not {self.direction!r}")
        if self.ball not in BALLS:
            raise ValueError(f"{op}: ball must be one of {', '.join(BALLS)}, not {self.ball!r}")
        if not 0 <= self.group < dimensions:
            raise ValueError(f"{op}: group must be from 0 to {dimensions - 1}, not {self.group}")
