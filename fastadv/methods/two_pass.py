"""What FGSM, FGM and PGD share: a clean pass, a climb, and a pass at the perturbation that it found."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastadv.engine.passes import Closure, Pass
from fastadv.methods.base import StepResult, number
from fastadv.methods.embedded import EmbeddingMethod


class TwoPass(EmbeddingMethod):
    """Trains on the clean and on the adversarial loss, each with its weight."""

    def __init__(self, model: nn.Module, *, clean_weight: float = 1.0, adv_weight: float = 1.0, **common: Any) -> None:
        self.clean_weight = number("clean_weight", clean_weight)
        self.adv_weight = number("adv_weight", adv_weight)
        super().__init__(model, **common)

    def run(self, closure: Closure, attack: Closure | None) -> StepResult:
        """Clean pass, the climb, adversarial pass."""
        clean = self.clean(closure, attack)  # the gradient at x
        self.climb(attack or closure)
        adversarial = self.descend(closure, self.adv_weight)  # accumulates onto the clean gradient
        return self.result(clean, adversarial)

    def clean(self, closure: Closure, attack: Closure | None) -> Pass | None:
        """The clean pass, if it counts, and the gradient that the first ascent follows.

        A clean pass gives that gradient too, unless the ascent begins elsewhere or follows another loss.
        """
        done = self.descend(closure, self.clean_weight, more=True) if self.clean_weight else None
        if done is None or attack is not None or self.random_start is not None:
            self.start()
            self.probe(attack or closure)
        return done
