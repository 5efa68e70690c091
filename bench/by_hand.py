"""The methods as one would write them for one model by hand: the strongest plain PyTorch we know.

Each is a whole training step on a BERT without dropout: delta is added behind the embedding by a hook, autograd brings
all gradients, and no pass is made that the method does not need. What is compared is compared by `bench.divergences`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.divergences import shorter as symmetric_kl

Closure = Callable[[], Tensor]
Answer = Callable[[], tuple[Tensor, Tensor]]  # the loss and the logits


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

    def probe(self, value: Tensor) -> Tensor:
        """The gradient of delta, and nothing else."""
        assert self.delta is not None
        return torch.autograd.grad(value, self.delta)[0]

    def move(self, delta: Tensor) -> None:
        self.delta = delta.detach().requires_grad_()


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


def smart(hand: ByHand, answer: Answer, noise: Tensor, epsilon: float) -> None:
    """One step per token away from the model's own answer, and the divergence there; both sides are trained."""
    loss, logits = answer()
    fixed = logits.detach()
    hand.move(noise)
    gradient = hand.probe(symmetric_kl(answer()[1], fixed))
    largest = gradient.abs().amax(-1, keepdim=True)
    hand.delta = noise.addcdiv(gradient, largest, value=epsilon).clamp_(-epsilon, epsilon)
    (loss + symmetric_kl(answer()[1], logits)).backward()  # type: ignore[no-untyped-call]
    hand.delta = None


def vat(hand: ByHand, answer: Answer, noise: Tensor, epsilon: float) -> None:
    """One power iteration; the clean answer is a constant, so that its graph need not stay."""
    loss, logits = answer()
    loss.backward()  # type: ignore[no-untyped-call]
    fixed = logits.detach()
    hand.move(noise)
    gradient = hand.probe(kl(fixed, answer()[1]))
    hand.delta = gradient * (epsilon / gradient.flatten(1).norm(dim=1).view(-1, 1, 1))
    kl(fixed, answer()[1]).backward()  # type: ignore[no-untyped-call]
    hand.delta = None


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """KL(target || logits), the mean over the batch."""
    log_p, log_q = target.log_softmax(-1), logits.log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def llr(hand: ByHand, losses: Closure, start: Tensor, epsilon: float, steps: int) -> None:
    """The paper's search for the largest gap, and its two penalties (4 and 3), each sample by itself."""
    hand.move(torch.zeros_like(start))
    clean = losses()
    assert hand.delta is not None
    [slope] = torch.autograd.grad(clean.sum(), hand.delta, create_graph=True)
    fixed, g, delta = clean.detach(), slope.detach(), start
    for _ in range(steps):
        hand.move(delta)
        gap = losses() - fixed - (hand.delta * g).flatten(1).sum(1)
        delta = (delta + epsilon / 4 * hand.probe(gap.abs().sum()).sign_()).clamp_(-epsilon, epsilon)
    hand.delta = delta
    moved, linear = losses(), (delta * slope).flatten(1).sum(1)
    penalty = 4 * (moved - clean - linear).abs().mean() + 3 * linear.abs().mean()
    (clean.mean() + penalty).backward()  # type: ignore[no-untyped-call]
    hand.delta = None


class AWP:
    """All matrices together, by torch's multi-tensor functions; their copies serve from step to step."""

    def __init__(self, model: nn.Module, gamma: float) -> None:
        self.weights, self.gamma = [p for p in model.parameters() if p.dim() > 1], gamma
        self.saved = [weight.detach().clone() for weight in self.weights]

    def step(self, closure: Closure) -> None:
        closure().backward()  # type: ignore[no-untyped-call]
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        with torch.no_grad():
            torch._foreach_copy_(self.saved, self.weights)
            size = torch._foreach_div(torch._foreach_norm(self.weights), torch._foreach_norm(gradients))
            torch._foreach_mul_(size, self.gamma)
            torch._foreach_add_(self.weights, torch._foreach_mul(gradients, size))
        closure().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.saved)


def neftune(hand: ByHand, closure: Closure, noise: Callable[[], Tensor]) -> None:
    """One pass at the noise."""
    hand.delta = noise()
    closure().backward()  # type: ignore[no-untyped-call]
    hand.delta = None


class Proximal:
    """A teacher that is a second model, and its average by torch's multi-tensor function."""

    def __init__(self, model: nn.Module, teacher: nn.Module, decay: float) -> None:
        self.mine, self.theirs, self.decay = list(teacher.parameters()), list(model.parameters()), decay

    def step(self, answer: Answer, teacher: Answer) -> None:
        with torch.no_grad():
            _, fixed = teacher()
        loss, logits = answer()
        (loss + symmetric_kl(logits, fixed)).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            torch._foreach_lerp_(self.mine, self.theirs, 1 - self.decay)


def _stepped(delta: Tensor | None, gradient: Tensor, step_size: float) -> Tensor:
    """Up each sample's gradient."""
    assert delta is not None
    norms = gradient.flatten(1).norm(dim=1).view(-1, 1, 1)
    return delta.detach().addcdiv(gradient, norms, value=step_size)


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
