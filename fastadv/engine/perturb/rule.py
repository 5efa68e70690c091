"""How a perturbation ascends: a step, then a projection; see `fastadv.ops.ascend` and `fastadv.ops.moment_step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastadv.arguments.moments import planes
from fastadv.arguments.rule import MOMENT_DIRECTIONS


class Rule(NamedTuple):
    """One step of length `step_size` in a direction, then onto a ball of radius `epsilon`.

    Attributes:
        step_size: length of the step, in the embedding's units.
        epsilon: radius of the ball; None: no ball.
        direction: "l2" (g / norm of g), "sign", or "max" (g / largest magnitude in g); or "adam", "adamw" or "rmsprop",
            by moments of a search's gradients.
        ball: "l2", "linf", or "none".
    """

    step_size: float
    epsilon: float | None
    direction: str
    ball: str

    @property
    def by_element(self) -> bool:
        """Whether each element moves by itself, so that no norm of a group is taken."""
        own = self.direction == "sign" or self.moments > 0
        return own and (self.ball in ("linf", "none") or self.epsilon is None)

    @property
    def moments(self) -> int:
        """How many moments of its gradient each element has."""
        return planes(self.direction) if self.direction in MOMENT_DIRECTIONS else 0

    def of(self, site: int) -> Rule:  # noqa: ARG002
        """The rule of one of the perturbed places."""
        return self


class BySite(Rule):
    """Rules of the same direction and ball, one per perturbed place; as a rule itself it is the first of them."""

    each: Sequence[Rule]

    @staticmethod
    def made(each: Sequence[Rule]) -> Rule:
        """Of several, or the one that there is."""
        if len(each) == 1:
            return each[0]
        rule = BySite(*each[0])
        rule.each = each
        return rule

    @property
    def by_element(self) -> bool:
        """Whether that is so at every place."""
        return all(rule.by_element for rule in self.each)

    def of(self, site: int) -> Rule:
        """The place's own."""
        return self.each[site]

    def _replace(self, **_: Any) -> Rule:  # type: ignore[override]
        raise ValueError("each perturbed module has an epsilon or a step_size of its own: this call needs one for all")
