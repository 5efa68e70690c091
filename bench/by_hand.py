"""FGSM, FreeLB, YOPO and FreeAT as one would write them for one model by hand: the strongest plain PyTorch we know.

Each is a whole training step on a BERT without dropout: delta is added behind the embedding by a hook, autograd brings
all gradients, and no pass is made that the method does not need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Closure = Callable[[], Tensor]


class ByHand:
    """A model whose embedding adds `delta` while there is one."""

    def __init__(self, model: Any) -> None:
        self.delta: Tensor | None = None
        model.get_input_embeddings().register_forward_hook(self._add)

    def _add(self, *call: Any) -> Tensor | None:
        output: Tensor = call[-1]
        if self.delta is None:
            return None
        if self.delta.shape != output.shape:
            self.delta = torch.zeros_like(output, requires_grad=True)
        return output + self.delta

    def begin(self) -> None:
        """At zero, of a shape that the first pass finds out."""
        self.delta = torch.zeros((), requires_grad=True)

    def full(self, closure: Closure, passes: int = 1) -> Tensor:
        """A pass that trains; the gradient of delta."""
        (closure() / passes).backward()  # type: ignore[no-untyped-call]
        assert self.delta is not None and self.delta.grad is not None
        return self.delta.grad

    def move(self, delta: Tensor) -> None:
        self.delta = delta.requires_grad_()


def fgsm(hand: ByHand, closure: Closure, epsilon: float) -> None:
    """Clean pass, and one at epsilon * sign(g)."""
    hand.begin()
    gradient = hand.full(closure)
    hand.move(gradient.sign_().mul_(epsilon))
    hand.full(closure)
    hand.delta = None


def freelb(hand: ByHand, closure: Closure, steps: int, step_size: float) -> None:
    """K passes, K - 1 steps per sample."""
    hand.begin()
    for left in reversed(range(steps)):
        gradient = hand.full(closure, steps)
        if left:
            hand.move(_stepped(hand.delta, gradient, step_size))
    hand.delta = None


def yopo(hand: ByHand, closure: Closure, layers: Layers, steps: int, inner_steps: int, step_size: float) -> None:
    """As FreeLB, with n - 1 steps more through the first layer, which is called by itself."""
    hand.begin()
    for left in reversed(range(steps)):
        with layers.watched():
            gradient = hand.full(closure, steps)
        for inner in range(inner_steps if left else 0):
            if inner:
                gradient = layers.gradient(hand)
            hand.move(_stepped(hand.delta, gradient, step_size))
    hand.delta = None


class Layers:
    """The embeddings and the first layer of a BERT."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.embeddings, self.first, self.ids = model.bert.embeddings, model.bert.encoder.layer[0], ids
        self.p: Tensor | None = None

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the gradient of the first layer's output is kept."""
        handle = self.first.register_forward_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, *call: Any) -> None:
        _tensor(call[-1]).register_hook(self._keep)  # type: ignore[no-untyped-call]

    def _keep(self, gradient: Tensor) -> None:
        self.p = gradient

    def gradient(self, hand: ByHand) -> Tensor:
        """Of <p, first layer's output> with respect to delta."""
        hidden = _tensor(self.first(self.embeddings(input_ids=self.ids)))
        assert hand.delta is not None
        return torch.autograd.grad(hidden, hand.delta, self.p)[0]


class FreeAT:
    """One replay: the gradient that trains also moves the buffer."""

    def __init__(self, hand: ByHand, epsilon: float) -> None:
        self.hand, self.epsilon = hand, epsilon
        self.left: Tensor | None = None

    def replay(self, closure: Closure) -> None:
        if self.left is None:
            self.hand.begin()
        else:
            self.hand.move(self.left)
        gradient = self.hand.full(closure)
        assert self.hand.delta is not None
        self.left = (self.hand.delta.detach() + self.epsilon * gradient.sign_()).clamp_(-self.epsilon, self.epsilon)
        self.hand.delta = None


def _stepped(delta: Tensor | None, gradient: Tensor, step_size: float) -> Tensor:
    """Up each sample's gradient."""
    assert delta is not None
    norms = gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    return delta.detach().addcdiv(gradient, norms, value=step_size)


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
