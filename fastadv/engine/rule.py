"""How a method ascends: see `fastadv.ops.ascend`."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """One step of length `step_size` in a direction, then onto a ball of radius `epsilon`."""

    step_size: float
    epsilon: float | None
    direction: str
    ball: str
