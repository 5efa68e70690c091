"""A term that a step owes besides its losses: how far the unperturbed model has moved from a teacher.

It is found in an unperturbed full pass whose gradient no ascent follows, which it would turn; where a method has none,
in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastadv.engine import rng
from fastadv.engine.dropout import Dropout


class Teacher(Protocol):
    """Knows what an answer should have been, and how far another is from it."""

    def answer(self, closure: Callable[[], Any]) -> Any:
        """The teacher's own, to the closure's batch."""

    def term(self, output: Any, answer: Any) -> Tensor:
        """How far the model's output is from that answer, weighted: 0-d, with the model's graph."""


class Proximity:
    """What a step owes to a teacher, if it has one."""

    def __init__(self, dropout: Dropout) -> None:
        self.teacher: Teacher | None = None
        self._dropout = dropout
        self._owing = False
        self._answer: Any = None
        self._term: Tensor | None = None

    def begin(self) -> None:
        """A new step."""
        self._owing, self._answer, self._term = self.teacher is not None, None, None

    @property
    def owing(self) -> bool:
        """Whether the step has had no pass yet from which the term could come."""
        return self._owing

    def ask(self, closure: Callable[[], Any], device: torch.device) -> None:
        """Before an unperturbed full pass: let the teacher answer, with the dropout masks that the pass will see."""
        if not self._owing or self.teacher is None:
            return
        if self._dropout.mode == "same":
            self._dropout.before_pass(device)  # the pass replays it
            self._answer = self.teacher.answer(closure)
            return
        state = rng.Replayed(device)
        self._answer = self.teacher.answer(closure)
        state.again()

    def compare(self, output: Any) -> None:
        """After that pass's forward: the term, which the next backward takes along."""
        if self._owing and self.teacher is not None:
            self._term = self.teacher.term(output, self._answer)
            self._owing, self._answer = False, None

    def joined(self, loss: Tensor | None) -> Tensor | None:
        """`loss` and the term, which is then paid; None if there is neither."""
        term, self._term = self._term, None
        if term is None or loss is None:
            return term if loss is None else loss
        return loss + term
