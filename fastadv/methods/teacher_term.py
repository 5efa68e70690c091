"""BregmanProximal's term: how far the unperturbed model has moved from its teacher.

It is found in an unperturbed full pass whose gradient no ascent follows, which it would turn; where a method has none,
in a pass of its own (`Step.finish`).
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

from torch import Tensor

from fastadv.engine.results import Closure
from fastadv.engine.safety import rng
from fastadv.engine.step import Step


class Answers(Protocol):
    """Answers a batch, and measures how far another answer is."""

    def answer(self, closure: Closure) -> Any:
        """The teacher's answer to the closure's batch."""

    def distance(self, output: Any, answer: Any, step: Step) -> Tensor:
        """How far the model's output is from that answer, weighted: 0-d, with the model's graph."""


class TeacherTerm:
    """One step's; see `fastadv.engine.results.Term`."""

    def __init__(self, teacher: Answers, step: Step) -> None:
        self.owing = True
        self._teacher = teacher
        self._step = step
        self._answer: Any = None
        self._term: Tensor | None = None

    def ask(self, closure: Closure) -> None:
        """Before the pass: let the teacher answer, with the dropout masks that the pass will see."""
        if not self.owing:
            return
        draws = self._step.draws
        if draws.same:
            draws.next_pass()  # the pass replays it
            self._answer = self._teacher.answer(partial(self._step.call, closure))
            return
        state = rng.Replayed(draws.device)
        self._answer = self._teacher.answer(partial(self._step.call, closure))
        state.again()

    def compare(self, output: Any) -> None:
        """After the pass's forward: the term, for the next backward to take along."""
        if self.owing:
            self._term = self._teacher.distance(output, self._answer, self._step)
            self.owing, self._answer = False, None

    def joined(self, loss: Tensor | None) -> Tensor | None:
        """`loss` and the term, which is then paid; None if there is neither."""
        term, self._term = self._term, None
        if term is None or loss is None:
            return term if loss is None else loss
        return loss + term
