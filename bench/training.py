"""Training steps of FGM and PGD in table scope: the classic script's, plain PyTorch's, and fastadv's.

The gradients of one step, accumulated in `.grad`; there is no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from bench import peers
from bench.attack_steps import Ball, BestStep, IndexAddStep, Rows
from bench.contest import Field
from bench.race import Entry
from fastadv import reference

Closure = Callable[[], Tensor]


class BestTraining:
    """The engine's schedule in plain PyTorch: a full pass, probes, a full pass; the embedding's output is a leaf.

    What autograd does not compute for the table (its dense gradient, in every full pass) is made once, at the end.
    """

    def __init__(self, model: nn.Module, ball: Ball, steps: int) -> None:
        self.embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        self.ball, self.steps = ball, steps
        self.embedding.register_forward_hook(self._replace)
        self.leaf: Tensor | None = None
        self.live = False

    def _replace(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.live:
            return None
        if self.leaf is None:
            self.ids, self.leaf = args[0], output.detach().requires_grad_()
        return self.leaf

    def backward(self, closure: Closure) -> None:
        self.live = True
        try:
            first = self._full(closure)
            attack = BestStep(self.embedding.weight.detach(), self.ids, self.ball)
            grad = first
            for left in range(self.steps - 1, -1, -1):
                moved = attack.step(grad.reshape(-1, grad.shape[-1]))
                self.leaf = moved.reshape(first.shape).detach().requires_grad_()
                grad = self._probe(closure) if left else self._full(closure)
            self._accumulate(first.add_(grad).reshape(-1, grad.shape[-1]), attack.rows)
        finally:
            self.live, self.leaf = False, None

    def _full(self, closure: Closure) -> Tensor:
        closure().backward()  # type: ignore[no-untyped-call]
        assert self.leaf is not None and self.leaf.grad is not None
        return self.leaf.grad

    def _probe(self, closure: Closure) -> Tensor:
        loss = closure()
        assert self.leaf is not None
        return torch.autograd.grad(loss, self.leaf)[0]

    def _accumulate(self, grad: Tensor, rows: Rows) -> None:
        weight = self.embedding.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        summed = F.embedding_bag(rows.order, grad, rows.starts, mode="sum")
        weight.grad.index_add_(0, rows.unique, summed)


class HookTraining:
    """The same schedule as most would write it: delta is added in a hook, and autograd brings the table's gradient."""

    def __init__(self, model: nn.Module, ball: Ball, steps: int) -> None:
        self.embedding: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        self.ball, self.steps = ball, steps
        self.embedding.register_forward_hook(self._add)
        self.delta: Tensor | None = None
        self.live = False

    def _add(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.live:
            return None
        if self.delta is None:
            self.ids, self.words = args[0], output.detach()
            self.delta = torch.zeros_like(output).requires_grad_()
        return output + self.delta

    def backward(self, closure: Closure) -> None:
        self.live = True
        try:
            grad = self._full(closure)
            attack = IndexAddStep(self.embedding.weight.detach(), self.ids, self.ball)
            for left in range(self.steps - 1, -1, -1):
                moved = attack.step(grad.reshape(-1, grad.shape[-1]))
                self.delta = (moved.view_as(self.words) - self.words).requires_grad_()
                grad = torch.autograd.grad(closure(), self.delta)[0] if left else self._full(closure)
        finally:
            self.live, self.delta = False, None

    def _full(self, closure: Closure) -> Tensor:
        closure().backward()  # type: ignore[no-untyped-call]
        assert self.delta is not None and self.delta.grad is not None
        return self.delta.grad


def entries(
    model: nn.Module, steps: Mapping[str, Callable[[], object]], after: Callable[[], object] | None = None
) -> dict[str, Entry]:
    """Each step from gradients that are None, and `after` it what belongs to it; the gradients are its answer."""

    def entry(run: Callable[[], object]) -> Entry:
        def answer() -> list[Tensor]:
            run()
            return [p.grad for p in model.parameters() if p.grad is not None]

        return Entry(model.zero_grad, run if after is None else lambda: (run(), after()), answer)

    return {name: entry(run) for name, run in steps.items()}


def field(
    model: nn.Module, steps: Mapping[str, Callable[[], object]], shape: tuple[int, ...], tolerance: float = 1e-4
) -> Field:
    """Steps of one model. Plain training, which is there for scale, finds other gradients."""
    made = entries(model, steps)
    return Field(
        {**made, "plain": made["plain"]._replace(compared=False)}, shape=shape, tolerance=tolerance, weighed=False
    )


def answering(entries: Mapping[str, Entry], answer: Callable[[Callable[[], object]], object]) -> dict[str, Entry]:
    """With `answer(run)` as what is compared."""

    def changed(entry: Entry) -> Entry:
        return entry._replace(answer=lambda: answer(entry.run)) if entry.compared else entry

    return {name: changed(entry) for name, entry in entries.items()}


def takes_part(contestant: str) -> bool:
    """Whether it is installed, if it is a peer."""
    return contestant not in peers.MODULES or peers.installed(contestant)


SCHEDULED: dict[str, Any] = {"torch, index_add": HookTraining, "torch": BestTraining}


def schedule(method: str) -> tuple[Ball, int]:
    """FGM or PGD-K: how it steps, and how often."""
    return (Ball(1.0, float("inf")), 1) if method == "FGM" else (Ball(0.3, 1.0), int(method.removeprefix("PGD-")))


def step(contestant: str, method: str, model: nn.Module, closure: Closure) -> Callable[[], object]:
    """A training step without its optimizer."""
    ball, steps = schedule(method)
    if contestant == "plain":
        return lambda: closure().backward()  # type: ignore[no-untyped-call]
    if contestant in SCHEDULED:
        scheduled = SCHEDULED[contestant](model, ball, steps)
        return lambda: scheduled.backward(closure)
    if contestant == peers.BERT4TORCH:
        return peers.bert4torch_step(method, model, closure, *ball, steps)
    if method == "FGM":
        adv: Any = fastadv.FGM
        script: Any = reference.fgm
        numbers: dict[str, Any] = {"epsilon": ball.step_size}
    else:
        adv, script = fastadv.PGD, reference.pgd
        numbers = {"epsilon": ball.epsilon, "step_size": ball.step_size, "steps": steps}
    if contestant == "reference":
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return lambda: script(model, closure, embedding, **numbers)
    ours = adv(model, **numbers)
    return lambda: ours.backward(closure)


def compiled_step(method: str, model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], object]:
    """fastadv's, of the model under torch.compile; the method is made before the model runs for the first time."""
    ball, steps = schedule(method)
    compiled = torch.compile(model)
    adv = fastadv.PGD(compiled, epsilon=ball.epsilon, step_size=ball.step_size, steps=steps)
    mask = torch.ones_like(batch["input_ids"])
    return lambda: adv.backward(lambda: compiled(**batch).loss, mask=mask)
