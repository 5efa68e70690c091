"""The methods as one would write them for one model by hand: the strongest plain PyTorch we know.

Each is a whole training step on a BERT without dropout: delta is added behind the embedding by a hook, autograd brings
all gradients, and no pass is made that the method does not need. What is compared is compared by `bench.divergences`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.divergences import shorter as symmetric_kl
from fastadv.reference.vat import kl

Closure = Callable[[], Tensor]
Answer = Callable[[], tuple[Tensor, Tensor]]  # the loss and the logits


class ByHand:
    """A model whose embedding adds `delta` while there is one."""

    delta: Any = None
    left: Any = None  # FreeAT's, from step to step

    def __init__(self, model: Any) -> None:
        self.embedding = model.get_input_embeddings()
        self.embedding.register_forward_hook(self._add)

    def _add(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.delta is None:
            return None
        self.ids, self.words = args[0], output.detach()
        if self.delta.shape != output.shape:
            self.delta = torch.zeros_like(output, requires_grad=True)
        return output + self.delta

    def step(self, method: Callable[..., None], *given: Any) -> Callable[[], None]:
        """A training step: of zero, of a shape that the first pass finds out, and afterwards the model is plain."""

        def run() -> None:
            self.delta = torch.zeros((), requires_grad=True)
            method(self, *given)
            self.delta = None

        return run

    def full(self, closure: Closure, passes: int = 1) -> Any:
        """A pass that trains; the gradient of delta."""
        (closure() / passes).backward()
        return self.delta.grad

    def probe(self, value: Tensor) -> Tensor:
        """The gradient of delta, and nothing else."""
        return torch.autograd.grad(value, self.delta)[0]

    def move(self, delta: Tensor) -> None:
        self.delta = delta.detach().requires_grad_()

    def climb(self, gradient: Tensor, step_size: float) -> Tensor:
        """Up each sample's gradient."""
        return self.delta.detach().addcdiv(gradient, _norms(gradient), value=step_size)


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1)


def fgsm(hand: ByHand, closure: Closure, epsilon: float) -> None:
    """Clean pass, and one at epsilon * sign(g)."""
    hand.move(hand.full(closure).sign_().mul_(epsilon))
    hand.full(closure)


def pgd(hand: ByHand, closure: Closure, steps: int, step_size: float, epsilon: float) -> None:
    """Clean pass, probes, and a pass at the edge of each sample's ball."""
    gradient = hand.full(closure)
    for left in reversed(range(steps)):
        moved = hand.climb(gradient, step_size)
        hand.move(moved.mul_((epsilon / _norms(moved)).clamp_(max=1)))
        if left:
            gradient = hand.probe(closure())
    hand.full(closure)


def freelb(hand: ByHand, closure: Closure, steps: int, step_size: float) -> None:
    """K passes, K - 1 steps per sample."""
    for left in reversed(range(steps)):
        gradient = hand.full(closure, steps)
        if left:
            hand.move(hand.climb(gradient, step_size))


def yopo(hand: ByHand, closure: Closure, layers: Layers, steps: int, inner_steps: int, step_size: float) -> None:
    """As FreeLB, with n - 1 steps more through the first layer, which is called by itself."""
    for left in reversed(range(steps)):
        with layers.watched():
            gradient = hand.full(closure, steps)
        for inner in range(inner_steps if left else 0):
            if inner:
                gradient = layers.gradient(hand)
            hand.move(hand.climb(gradient, step_size))


class Layers:
    """The embeddings and the first layer of a BERT."""

    p: Tensor | None = None

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.embeddings, self.first, self.ids = model.bert.embeddings, model.bert.encoder.layer[0], ids

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, the gradient of the first layer's output is kept."""
        handle = self.first.register_forward_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, *call: Any) -> None:
        _tensor(call[-1]).register_hook(partial(setattr, self, "p"))

    def gradient(self, hand: ByHand) -> Tensor:
        """Of <p, first layer's output> with respect to delta."""
        hidden = _tensor(self.first(self.embeddings(input_ids=self.ids)))
        return torch.autograd.grad(hidden, hand.delta, self.p)[0]


def _tensor(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def freeat(hand: ByHand, closure: Closure, epsilon: float) -> None:
    """One replay: the gradient that trains also moves the buffer."""
    if hand.left is not None:
        hand.move(hand.left)
    gradient = hand.full(closure)
    hand.left = (hand.delta.detach() + epsilon * gradient.sign_()).clamp_(-epsilon, epsilon)


def smart(hand: ByHand, answer: Answer, noise: Tensor, epsilon: float) -> None:
    """One step per token away from the model's own answer, and the divergence there; both sides are trained."""
    hand.delta = None
    loss, logits = answer()
    fixed = logits.detach()
    hand.move(noise)
    gradient = hand.probe(symmetric_kl(answer()[1], fixed))
    largest = gradient.abs().amax(-1, keepdim=True)
    hand.delta = noise.addcdiv(gradient, largest, value=epsilon).clamp_(-epsilon, epsilon)
    (loss + symmetric_kl(answer()[1], logits)).backward()


def vat(hand: ByHand, answer: Answer, noise: Tensor, epsilon: float) -> None:
    """One power iteration; the clean answer is a constant, so that its graph need not stay."""
    hand.delta = None
    loss, logits = answer()
    loss.backward()
    fixed = logits.detach()
    hand.move(noise)
    gradient = hand.probe(kl(answer()[1], fixed))
    hand.delta = gradient * (epsilon / _norms(gradient))
    kl(answer()[1], fixed).backward()


def llr(hand: ByHand, losses: Closure, start: Tensor, epsilon: float, steps: int) -> None:
    """The paper's search for the largest gap, and its two penalties (4 and 3), each sample by itself."""
    hand.move(torch.zeros_like(start))
    clean = losses()
    [slope] = torch.autograd.grad(clean.sum(), hand.delta, create_graph=True)
    fixed, g, delta = clean.detach(), slope.detach(), start
    for _ in range(steps):
        hand.move(delta)
        gap = losses() - fixed - (hand.delta * g).flatten(1).sum(1)
        delta = (delta + epsilon / 4 * hand.probe(gap.abs().sum()).sign_()).clamp_(-epsilon, epsilon)
    hand.delta = delta
    moved, linear = losses(), (delta * slope).flatten(1).sum(1)
    penalty = 4 * (moved - clean - linear).abs().mean() + 3 * linear.abs().mean()
    (clean.mean() + penalty).backward()


def neftune(hand: ByHand, closure: Closure, noise: Callable[[], Tensor]) -> None:
    """One pass at the noise."""
    hand.delta = noise()
    closure().backward()


class AWP:
    """All matrices together, by torch's multi-tensor functions; their copies serve from step to step."""

    def __init__(self, model: nn.Module, gamma: float) -> None:
        self.weights, self.gamma = [p for p in model.parameters() if p.dim() > 1], gamma
        self.saved = [weight.detach().clone() for weight in self.weights]

    def step(self, closure: Closure) -> None:
        closure().backward()
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        with torch.no_grad():
            torch._foreach_copy_(self.saved, self.weights)
            size = torch._foreach_div(torch._foreach_norm(self.weights), torch._foreach_norm(gradients))
            torch._foreach_mul_(size, self.gamma)
            torch._foreach_add_(self.weights, torch._foreach_mul(gradients, size))
        closure().backward()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.saved)


class Proximal:
    """A teacher that is a second model, and its average by torch's multi-tensor function."""

    def __init__(self, model: nn.Module, teacher: nn.Module, decay: float) -> None:
        self.mine, self.theirs, self.decay = list(teacher.parameters()), list(model.parameters()), decay

    def step(self, answer: Answer, teacher: Answer) -> None:
        with torch.no_grad():
            _, fixed = teacher()
        loss, logits = answer()
        (loss + symmetric_kl(logits, fixed)).backward()
        with torch.no_grad():
            torch._foreach_lerp_(self.mine, self.theirs, 1 - self.decay)
