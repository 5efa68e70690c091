"""What the methods share that perturb embeddings: their arguments, and the verbs of their schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from fastadv.engine.embedding import EmbeddingChoice
from fastadv.engine.passes import Closure, Pass
from fastadv.engine.perturbation import SCOPES, TABLE_SCOPES
from fastadv.engine.rule import Rule
from fastadv.engine.site import Masks
from fastadv.engine.start import Draw, RandomStart, resolve, uniform
from fastadv.methods.base import Method, number, one_of, whole


class EmbeddingMethod(Method):
    """A schedule of descend, probe and ascend around the user's closure.

    A subclass writes `run` (a training step) and `climb` (the way from a first gradient to the perturbation).
    The arguments are described at `fastadv.PGD`.
    """

    norms: ClassVar[dict[str, tuple[str, str]]] = {"l2": ("l2", "l2"), "linf": ("sign", "linf")}  # direction, ball

    def __init__(
        self,
        model: nn.Module,
        *,
        epsilon: float | None,
        step_size: float,
        steps: int,
        norm: str,
        scope: str,
        random_start: RandomStart = False,
        embedding: EmbeddingChoice = None,
        tied: str = "lookup",
        **common: Any,
    ) -> None:
        one_of("norm", norm, self.norms)
        one_of("scope", scope, SCOPES)
        one_of("tied", tied, ("lookup", "both"))
        if tied == "both" and (scope not in TABLE_SCOPES or random_start is not False):
            raise ValueError(
                "tied='both' moves the table itself, from where it is: it needs scope='table' or 'row' and "
                "random_start=False; tied='lookup' perturbs the lookups alone"
            )
        self.epsilon = None if epsilon is None else number("epsilon", epsilon)
        self.step_size = number("step_size", step_size)
        self.steps = whole("steps", steps, 1)
        self.norm = norm
        self.scope = scope
        self.random_start = self.resolve(random_start)
        super().__init__(model, site={"embedding": embedding, "scope": scope, "tied": tied}, **common)

    @contextlib.contextmanager
    def perturbed(self, closure: Closure, mask: Masks = None) -> Iterator[None]:
        """Find the perturbation of one batch, and let every forward inside the block see it; see `Method.perturbed`."""
        with self.engine.step(mask, self.random_start):
            target = self.target(closure)
            self.start()
            self.probe(target)
            self.climb(target)
            self.engine.apply()
            yield

    @property
    def skipped(self) -> Tensor:
        """How many groups took no step because their gradient was not finite: int64, 0-d, on the device."""
        return self.engine.perturbation.skipped

    @property
    def perturbation_norm(self) -> Tensor:
        """The last perturbation's norm, the mean over its groups: 0-d, on the device."""
        return self.engine.perturbation.norm(self.norm)

    # What a subclass writes

    def climb(self, target: Closure) -> None:
        """From the gradient at the start to the last perturbation, by ascents and probes on `target`."""
        raise NotImplementedError

    def target(self, closure: Closure) -> Closure:
        """What the ascent maximises: of the closure's batch, its value."""
        return closure

    def resolve(self, random_start: RandomStart) -> Draw | None:
        """What the argument stands for."""
        return resolve(random_start, self.epsilon, uniform(self.norm))

    # What a subclass uses

    def start(self) -> None:
        """Put the perturbation at its start."""
        self.engine.start()

    def probe(self, closure: Closure) -> Pass:
        """The perturbation's gradient alone."""
        return self.engine.probe(closure)

    def ascend(self) -> None:
        """One step up the last gradient, then onto the ball."""
        direction, ball = self.norms[self.norm]
        self.engine.ascend(Rule(self.step_size, self.epsilon, direction, ball))

    def draw(self) -> Draw | None:
        """Where a training step's perturbation starts; None: at zero."""
        return self.random_start
