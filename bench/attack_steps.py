"""Attack steps in float32: the classic script's, the best plain PyTorch we could write, and fastadv's.

An attack step goes from dE, the gradient at the embedding's output, to the E of the next forward: one step of PGD of
length `step_size`, projected onto a ball of radius `epsilon`. What depends on the batch alone (its sort, the rows of
the table that it touches) is `prepare`, and has a benchmark of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm

from bench.race import Entry
from fastadv import ops, reference


class Ball(NamedTuple):
    """How an attack steps."""

    step_size: float
    epsilon: float


def entries(steps: Mapping[str, Any], start: Tensor, first: Tensor, second: Tensor) -> dict[str, Entry]:
    """The second step of each, along `second`; its answer is how far both have moved the embeddings from `start`."""

    def entry(step: Any) -> Entry:
        return Entry(
            lambda: (step.reset(), step.step(first)),
            lambda: step.step(second),
            lambda: step.step(second).reshape(start.shape) - start,
        )

    return {name: entry(step) for name, step in steps.items()}


# Table scope: step(dE [N, D]) -> E [N, D]


class ClassicStep:
    """The script: a dense gradient of the table, its norm, the whole table moved and projected, a lookup."""

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        self.embedding = nn.Embedding(*weight.shape, _weight=weight.clone())
        self.ids, self.ball = ids.flatten(), ball
        self.attacker = reference.PGD(self.embedding, self.embedding)
        self.first = True

    def reset(self) -> None:
        if not self.first:
            self.attacker.restore()
        self.first, self.embedding.weight.grad = True, None

    def step(self, grad: Tensor) -> Tensor:
        weight = self.embedding.weight
        weight.grad = torch.ops.aten.embedding_dense_backward(grad, self.ids, len(weight), -1, False)
        self.attacker.attack(self.ball.epsilon, self.ball.step_size, is_first_attack=self.first)
        self.first = False
        return F.embedding(self.ids, weight.data)


class Rows(NamedTuple):
    """Where the rows of a batch lie: table row `unique[inverse]`, positions `order` row by row from `starts` on."""

    unique: Tensor
    inverse: Tensor
    order: Tensor
    starts: Tensor


def prepare_rows(ids: Tensor) -> Rows:
    """One sort gives all of it; `unique` alone takes half the time, but then only `index_add_` can sum."""
    by_id, order = ids.flatten().sort(stable=True)
    unique, row, counts = torch.unique_consecutive(by_id, return_inverse=True, return_counts=True)
    inverse = torch.empty_like(order)
    inverse[order] = row
    return Rows(unique, inverse, order, counts.cumsum(0) - counts)


class BestStep:
    """Plain PyTorch on touched rows: an embedding bag sums dE faster than `index_add_`, the ball is one factor."""

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        self.weight, self.ids, self.ball = weight, ids, ball
        self.prepare()
        self.moved = torch.empty_like(self.base)
        self.out = weight.new_empty(ids.numel(), weight.shape[1])

    def prepare(self) -> None:
        self.rows = prepare_rows(self.ids)
        self.base = self.weight.index_select(0, self.rows.unique)
        self.r, self.scale = torch.zeros_like(self.base), 1.0  # the perturbation is scale * r, for a few steps

    def reset(self) -> None:
        self.r.zero_()
        self.scale = 1.0

    def step(self, grad: Tensor) -> Tensor:
        g = F.embedding_bag(self.rows.order, grad, self.rows.starts, mode="sum")
        self.r.add_(g, alpha=self.ball.step_size / vector_norm(g).item() / self.scale)
        self.scale = min(self.scale, self.ball.epsilon / vector_norm(self.r).item())
        torch.add(self.base, self.r, alpha=self.scale, out=self.moved)
        return torch.index_select(self.moved, 0, self.rows.inverse, out=self.out)


class IndexAddStep(BestStep):
    """What most would write: `index_add_` sums dE, norms stay tensors, and the table is looked up anew."""

    def step(self, grad: Tensor) -> Tensor:
        g = torch.zeros_like(self.r).index_add_(0, self.rows.inverse, grad)
        self.r.add_(g.mul_(self.ball.step_size / vector_norm(g)))
        self.r.mul_((self.ball.epsilon / vector_norm(self.r)).clamp_(max=1))
        moved = self.weight.index_select(0, self.rows.unique).add_(self.r)
        return torch.index_select(moved, 0, self.rows.inverse, out=self.out)


class CompiledStep(BestStep):
    """The same, its arithmetic under torch.compile; PyTorch's embedding bag and gather beat the generated ones."""

    def step(self, grad: Tensor) -> Tensor:
        g = F.embedding_bag(self.rows.order, grad, self.rows.starts, mode="sum")
        self.r, moved = _compiled(g, self.base, self.r, self.ball.step_size, self.ball.epsilon)
        return torch.index_select(moved, 0, self.rows.inverse, out=self.out)


@torch.compile(dynamic=False)
def _compiled(
    g: Tensor, base: Tensor, r: Tensor, step_size: float, epsilon: float, dims: tuple[int, ...] = (0, 1)
) -> tuple[Tensor, Tensor]:
    """The moved r and base + r, in two passes: |r + a g|^2 follows from the three products of r and g."""
    gg, gr, rr = (product.sum(dims, keepdim=True) for product in (g * g, g * r, r * r))
    a = step_size / gg.sqrt()
    scale = (epsilon / (rr + 2 * a * gr + a * a * gg).clamp(min=0).sqrt()).clamp(max=1)
    r = scale * r + (scale * a) * g
    return r, base + r


class FusedStep:
    """The engine's ops, on buffers that serve every step."""

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        self.weight, self.ids, self.ball = weight, ids.flatten(), ball
        self.prepare()
        self.r = weight.new_zeros(len(self.groups.stops), weight.shape[1])
        self.g = torch.empty_like(self.r)
        self.out = weight.new_empty(ids.numel(), weight.shape[1])
        self.skipped = torch.zeros((), dtype=torch.int64, device=ids.device)

    def prepare(self) -> None:
        groups = ops.segments(self.ids, len(self.weight), fused=True)
        self.groups = groups.trimmed() if self.ids.device.type == "cpu" else groups  # how many, a GPU does not tell

    def reset(self) -> None:
        self.r.zero_()

    def step(self, grad: Tensor) -> Tensor:
        room = {"weight": self.weight, "ids": self.ids, "embedded": self.out, "room": self.g}
        ops.table_step(self.r, grad, self.groups, group=0, fused=True, **_rule(self), **room)
        return self.out


def _rule(step: Any) -> dict[str, Any]:
    length, radius = step.ball
    return {"skipped": step.skipped, "step_size": length, "epsilon": radius, "direction": "l2", "ball": "l2"}


# Sample scope: step(dE [B, T, D]) -> E [B, T, D]


class BestSampleStep:
    """Plain PyTorch: each sample's step and ball as factors of `addcmul`, out= into buffers."""

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        self.weight, self.ids, self.ball = weight, ids, ball
        self.prepare()
        self.delta, self.out = torch.zeros_like(self.words), torch.empty_like(self.words)
        self.scale: Tensor | None = None  # of each sample: the perturbation is scale * delta

    def prepare(self) -> None:
        self.words = F.embedding(self.ids, self.weight)

    def reset(self) -> None:
        self.delta.zero_()
        self.scale = None

    def step(self, grad: Tensor) -> Tensor:
        length = self.ball.step_size / _norms(grad)
        self.delta.addcmul_(grad, length if self.scale is None else length / self.scale)
        scale = self.ball.epsilon / _norms(self.delta)
        self.scale = scale.clamp_(max=1) if self.scale is None else torch.minimum(scale, self.scale)
        return torch.addcmul(self.words, self.delta, self.scale, out=self.out)


class CompiledSampleStep(BestSampleStep):
    """The same under torch.compile."""

    def step(self, grad: Tensor) -> Tensor:
        ball = self.ball
        self.delta, embedded = _compiled(grad, self.words, self.delta, ball.step_size, ball.epsilon, (1, 2))
        return embedded


def _norms(x: Tensor) -> Tensor:
    return vector_norm(x, dim=(1, 2), keepdim=True)


class FusedSampleStep:
    """The engine's op: one call from dE to E."""

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        self.weight, self.ids, self.ball = weight, ids, ball
        self.delta = weight.new_zeros(*ids.shape, weight.shape[1])
        self.out = torch.empty_like(self.delta)
        self.skipped = torch.zeros((), dtype=torch.int64, device=ids.device)

    def reset(self) -> None:
        self.delta.zero_()

    def step(self, grad: Tensor) -> Tensor:
        room = {"weight": self.weight, "ids": self.ids, "embedded": self.out}
        ops.ascend(self.delta, grad, group=1, fused=True, **_rule(self), **room)
        return self.out
