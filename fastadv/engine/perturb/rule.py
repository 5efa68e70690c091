"""How a perturbation ascends: a step in a direction, then a projection; see `fastadv.ops.ascend`."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """One step of length `step_size` in a direction, then onto a ball of radius `epsilon`.

    Attributes:
        step_size: length of the step, in the embedding's units.
        epsilon: radius of the ball; None: no ball.
        direction: "l2" (g / norm of g), "sign", or "max" (g / largest magnitude in g).
        ball: "l2", "linf", or "none".
    """

    step_size: float
    epsilon: float | None
    direction: str
    ball: str

    @property
    def by_element(self) -> bool:
        """Whether each element moves by itself, so that no norm of a group is taken."""
        return self.direction == "sign" and (self.ball in ("linf", "none") or self.epsilon is None)
