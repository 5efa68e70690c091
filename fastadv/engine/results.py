"""A pass's result, a step's figures, and the terms that join a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

Closure = Callable[[], Any]


class Reached(BaseException):
    """The forward has come as far as it should. Not an Exception: nothing on the way is to take it for an error."""


def check_closure(closure: object) -> None:
    """Raises TypeError for what is no function: most often the loss itself."""
    if not callable(closure):
        was = "the loss" if isinstance(closure, Tensor) else type(closure).__name__
        raise TypeError(
            f"backward takes a function that computes the loss, not {was}: adv.backward(lambda: model(**batch).loss)"
        )


class Pass(NamedTuple):
    """One pass over the model: with its graph as `forward` returns it, detached as `descend` does."""

    loss: Tensor
    output: Any


class StepResult(NamedTuple):
    """The figures of one step, detached. Tensors stay on the device; reading one synchronises.

    Attributes:
        loss: the clean loss where there is a clean pass, else the mean over the full passes. 0-d.
        adv_loss: the loss at the last perturbation; None on a step that was not attacked.
        output: the closure's result in the first pass, without its graph.
    """

    loss: Tensor
    adv_loss: Tensor | None
    output: Any


class Term(Protocol):
    """A term that a step owes besides its losses, of an unperturbed pass whose gradient no ascent follows."""

    owing: bool  # whether no pass has paid it yet

    def ask(self, closure: Closure) -> None:
        """Before such a pass."""

    def compare(self, output: Any) -> None:
        """After its forward."""

    def joined(self, loss: Tensor | None) -> Tensor | None:
        """The loss to go back through: `loss`, the term, or both; None if there is neither."""
