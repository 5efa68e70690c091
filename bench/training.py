"""Training steps of FGM and PGD in table scope: the classic script's, plain PyTorch's, and fastadv's.

The gradients of one step, accumulated in `.grad`; there is no optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from bench import by_hand, peers
from bench.attack_steps import Ball, BestStep, IndexAddStep
from bench.contest import Field
from bench.race import Entry, Run
from bench.workloads import Network, Size, Work, classifier, inputs, loss_closure
from fastadv import reference

Closure = Callable[[], Tensor]


class Leaf(by_hand.ByHand):
    """The embedding's output is the leaf: autograd brings nothing for the table."""

    def _add(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Any:
        if self.delta is not None and self.delta.shape != output.shape:
            self.ids, self.delta = args[0], output.detach().requires_grad_()
        return self.delta


def best(hand: Leaf, closure: Closure, ball: Ball, steps: int) -> None:
    """The engine's schedule in plain PyTorch: a full pass, probes, a full pass.

    What autograd does not compute for the table (its dense gradient, in every full pass) is made once, at the end.
    """
    grad = first = hand.full(closure)
    weight = hand.embedding.weight
    attack = BestStep(weight.detach(), hand.ids, ball)
    for left in range(steps - 1, -1, -1):
        hand.move(attack.step(grad.flatten(0, 1)).view_as(first))
        grad = hand.probe(closure()) if left else hand.full(closure)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    rows = attack.rows
    summed = F.embedding_bag(rows.order, first.add_(grad).flatten(0, 1), rows.starts, mode="sum")
    weight.grad.index_add_(0, rows.unique, summed)


def passes_alone(hand: Leaf, closure: Closure, steps: int) -> None:
    """Without any attack: what no engine can do without."""
    hand.full(closure)
    for left in range(steps - 1, -1, -1):
        hand.move(hand.delta)
        _ = hand.probe(closure()) if left else hand.full(closure)


def as_most_would(hand: by_hand.ByHand, closure: Closure, ball: Ball, steps: int) -> None:
    """The same schedule: delta is added in a hook, and autograd brings the table's gradient."""
    grad = hand.full(closure)
    attack, words = IndexAddStep(hand.embedding.weight.detach(), hand.ids, ball), hand.words
    for left in range(steps - 1, -1, -1):
        hand.move(attack.step(grad.flatten(0, 1)).view_as(words) - words)
        grad = hand.probe(closure()) if left else hand.full(closure)


FOR_SCALE = ("plain", "passes alone", "captured")  # they find other gradients, or leave them elsewhere


def schedule(method: str) -> tuple[Ball, int]:
    """FGM or PGD-K: how it steps, and how often."""
    return (Ball(1.0, float("inf")), 1) if method == "FGM" else (Ball(0.3, 1.0), int(method.removeprefix("PGD-")))


def step(  # noqa: PLR0911 - one for each
    contestant: str, method: str, model: nn.Module, closure: Any, batch: Any = None, mask: Tensor | None = None
) -> Run:
    """A training step without its optimizer; `batch` is what a captured one replays."""
    ball, steps = schedule(method)
    if contestant == "plain":
        return lambda: closure().backward()
    if contestant == peers.BERT4TORCH:
        return peers.bert4torch_step(method, model, closure, *ball, steps)
    if contestant == "torch, index_add":
        return by_hand.ByHand(model).step(as_most_would, closure, ball, steps)
    if contestant == "torch":
        return Leaf(model).step(best, closure, ball, steps)
    if contestant == "passes alone":
        return Leaf(model).step(passes_alone, closure, steps)
    numbers: dict[str, Any] = {"epsilon": ball.step_size}
    if method != "FGM":
        numbers = {"epsilon": ball.epsilon, "step_size": ball.step_size, "steps": steps}
    if contestant == "reference":
        script: Any = reference.fgm if method == "FGM" else reference.pgd
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        return partial(script, model, closure, embedding, **numbers)
    adv: Any = (fastadv.FGM if method == "FGM" else fastadv.PGD)(model, **numbers)
    if contestant == "captured":
        replay = adv.capture(lambda given: adv.backward(lambda: closure(given)).loss, batch)
        return lambda: replay(batch)
    return lambda: adv.backward(closure, mask=mask)


def field(
    model: Any, steps: Mapping[str, Run], shape: tuple[int, ...], tolerance: float, answer: Any = None, **more: Any
) -> Field:
    """Each step from gradients that are None; the gradients are its answer, unless another is given."""
    found = answer or (lambda run: (run(), gradients(model))[1])

    def entry(name: str, run: Run) -> Entry:
        return Entry(model.zero_grad, run, lambda: found(run), compared=name not in FOR_SCALE)

    return Field({name: entry(name, run) for name, run in steps.items()}, None, shape, tolerance, weighed=False, **more)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def pgd(
    names: Sequence[str], work: Work, network: Network, device: str, steps: int, dtype: torch.dtype, tolerance: float
) -> Field:
    """PGD-K on a batch of so many texts, of that length and vocabulary; each contestant is made when it first steps."""
    model, batch = classifier(network, work[-1], device), inputs(*work, device)
    closure = loss_closure(model, batch, dtype)

    def late(name: str) -> Run:
        made = cache(lambda: step(name, f"PGD-{steps}", model, closure, batch))
        return lambda: made()()  # noqa: PLW0108 - `made()` would make it now

    made = {name: late(name) for name in names if name != "captured" or device == "cuda"}
    # Of a narrow dtype the order of sums shows, and an attention key's bias has no gradient but rounding.
    kept = {"tolerance": 5e-2, "floor": 1e-3} if dtype != torch.float32 else {"tolerance": tolerance}
    return field(model, made, (*work, network[0]), **kept)


def compiled(size: Size, device: str) -> Field:
    """Two layers of the network: compiling takes longer than running. The method is made before the model runs.

    `compiled`: the schedule by hand; its probes compute all gradients.
    """
    work, (hidden, _, heads, inner) = (*size.small, size.steps[0][-1]), size.network
    model, batch = classifier((hidden, 2, heads, inner), work[-1], device), inputs(*work, device)
    mask, made = torch.ones_like(batch["input_ids"]), {}
    for name, contestant in {"plain": "plain", "compiled": "torch, index_add", "fused": "fused"}.items():
        run: Any = torch.compile(model)
        made[name] = step(contestant, "PGD-3", run, loss_closure(run, batch), mask=mask)
    return field(model, made, (*work, hidden), 1e-3)
