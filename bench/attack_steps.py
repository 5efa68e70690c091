"""Attack steps in float32: the classic script's, the best plain PyTorch we could write, and fastadv's.

An attack step goes from dE, the gradient at the embedding's output, to the E of the next forward: one step of PGD of
length `step_size`, projected onto a ball of radius `epsilon`. What depends on the batch alone (its sort, the rows of
the table that it touches) is prepared once, and has a benchmark of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vector_norm

from bench.contest import Field
from bench.race import Entry
from bench.workloads import LENGTH, RADIUS, Workload
from fastadv import ops, reference


class Ball(NamedTuple):
    step_size: float
    epsilon: float


# Table scope: step(dE [N, D]) -> E [N, D]


class ClassicStep:
    """The script: a dense gradient of the table, its norm, the whole table moved and projected, a lookup."""

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        self.embedding = nn.Embedding(*weight.shape, _weight=weight.clone())
        self.ids, self.ball = ids, ball
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
        self.weight, self.ball, self.rows = weight, ball, prepare_rows(ids)
        self.base = weight.index_select(0, self.rows.unique)
        self.r, self.scale = torch.zeros_like(self.base), 1.0  # the perturbation is scale * r, for a few steps
        self.moved, self.out = torch.empty_like(self.base), weight.new_empty(ids.numel(), weight.shape[1])

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
        self.read = _kept(self)
        self.r, moved = _compiled(g, self.base, self.r, *self.ball)
        return torch.index_select(moved, 0, self.rows.inverse, out=self.out)


@torch.compile(dynamic=False)
def _compiled(
    g: Tensor, base: Tensor, r: Tensor, length: float, radius: float, dims: Any = (0, 1), inverse: Any = None
) -> tuple[Tensor, Tensor]:
    """The moved r and base + r, in two passes: |r + a g|^2 follows from the three products of r and g."""
    g = g if inverse is None else torch.zeros_like(r).index_add(0, inverse, g)
    gg, gr, rr = (product.sum(dims, keepdim=True) for product in (g * g, g * r, r * r))
    a = length / gg.sqrt()
    scale = (radius / (rr + 2 * a * gr + a * a * gg).clamp(min=0).sqrt()).clamp(max=1)
    r = scale * r + (scale * a) * g
    return r, base + r if inverse is None else (base + r)[inverse]


class DeviceStep(BestStep):
    """The best plain PyTorch with no number read on the host."""

    def step(self, grad: Tensor) -> Tensor:
        g = F.embedding_bag(self.rows.order, grad, self.rows.starts, mode="sum")
        self.r.addcdiv_(g, vector_norm(g).expand_as(g), value=self.ball.step_size)
        self.r.mul_((self.ball.epsilon / vector_norm(self.r)).clamp_(max=1))
        torch.add(self.base, self.r, out=self.moved)
        return torch.index_select(self.moved, 0, self.rows.inverse, out=self.out)


def _kept(step: Any) -> Tensor | None:
    """The r that a graph under capture reads at every replay: it must outlive the next step's."""
    capturing = step.r.is_cuda and torch.cuda.is_current_stream_capturing()
    return step.r if capturing else getattr(step, "read", None)


class WholeCompiledStep(BestStep):
    """Everything under torch.compile, gather and scatter too."""

    def step(self, grad: Tensor) -> Tensor:
        self.read = _kept(self)
        self.r, out = _compiled(grad, self.base, self.r, *self.ball, inverse=self.rows.inverse)
        return out


class FusedStep:
    """The engine's op, on buffers that serve every step."""

    run: Callable[[Tensor], object]

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        groups = ops.segments(ids, len(weight), fused=True).trimmed()  # on a GPU nobody tells how many there are
        self.r = weight.new_zeros(len(groups.stops), weight.shape[1], dtype=torch.float32)
        given = self.given(weight, ids, ball, group=0, room=torch.empty_like(self.r))
        self.run = lambda grad: ops.table_step(self.r, grad, groups, **given)

    def given(self, weight: Tensor, ids: Tensor, ball: Ball, **more: Any) -> dict[str, Any]:
        """What both ops take beside the perturbation and the gradient."""
        self.out = weight.new_empty(*ids.shape, weight.shape[1])
        rule = {**ball._asdict(), "direction": "l2", "ball": "l2"}
        rule["skipped"] = torch.zeros((), dtype=torch.int64, device=ids.device)
        return {**rule, "weight": weight, "ids": ids, "embedded": self.out, "fused": True, **more}

    def reset(self) -> None:
        self.r.zero_()

    def step(self, grad: Tensor) -> Tensor:
        self.run(grad)
        return self.out


# Sample scope: step(dE [B, T, D]) -> E [B, T, D]


class BestSampleStep:
    """Plain PyTorch: each sample's step and ball as factors of `addcmul`, out= into buffers."""

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        self.ball, self.words = ball, F.embedding(ids, weight)
        self.delta, self.out = torch.zeros_like(self.words), torch.empty_like(self.words)
        self.scale: Tensor | None = None  # of each sample: the perturbation is scale * delta

    def reset(self) -> None:
        self.delta.zero_()
        self.scale = None

    def step(self, grad: Tensor) -> Tensor:
        norm = partial(vector_norm, dim=(1, 2), keepdim=True)
        length = self.ball.step_size / norm(grad)
        self.delta.addcmul_(grad, length if self.scale is None else length / self.scale)
        scale = self.ball.epsilon / norm(self.delta)
        self.scale = scale.clamp_(max=1) if self.scale is None else torch.minimum(scale, self.scale)
        return torch.addcmul(self.words, self.delta, self.scale, out=self.out)


class CompiledSampleStep(BestSampleStep):
    """The same under torch.compile."""

    def step(self, grad: Tensor) -> Tensor:
        self.delta, embedded = _compiled(grad, self.words, self.delta, *self.ball, (1, 2))
        return embedded


class FusedSampleStep(FusedStep):
    """One call from dE to E."""

    def __init__(self, weight: Tensor, ids: Tensor, ball: Ball) -> None:
        self.r = weight.new_zeros(*ids.shape, weight.shape[1], dtype=torch.float32)
        self.run = partial(ops.ascend, self.r, **self.given(weight, ids, ball, group=1))


# Contests: the second of two steps

TABLE: dict[str, Any] = {
    "reference": ClassicStep,
    "torch, index_add": IndexAddStep,
    "torch": BestStep,
    "compiled": CompiledStep,
    "fused": FusedStep,
}
TABLE_ON_GPU = {**TABLE, "torch": DeviceStep, "compiled, all of it": WholeCompiledStep}
SAMPLE: dict[str, Any] = {"torch": BestSampleStep, "compiled": CompiledSampleStep, "fused": FusedSampleStep}
PROJECTED, INSIDE = Ball(LENGTH, RADIUS), Ball(LENGTH, 1e6)
LARGEST = 1 << 30  # bytes of a table that the script still moves here: beyond, it takes 8 s a step, and six tables more


def table_scope(work: Workload, *, ball: Ball = PROJECTED, table: Mapping[str, Any] = TABLE) -> Field:
    """Without the script on the largest table."""
    fits = work.device != "cpu" or 4 * work.weight.numel() < LARGEST
    moved = 2 * work.word * work.positions + (8 + work.word) * work.words  # dE, E; r twice, W's rows
    moved += 16 * (work.passes - 1) * work.words  # the sums go through memory, where caches are too small
    ids, grads = work.ids.flatten(), [grad.flatten(0, 1) for grad in work.grads]
    return _field({name: table[name] for name in table if fits or name != "reference"}, work, ball, ids, grads, moved)


def sample_scope(work: Workload) -> Field:
    moved = (work.passes * (work.word + 4) + 4 + work.word) * work.positions  # dE, delta; delta, E
    return _field(SAMPLE, work, PROJECTED, work.ids, work.grads, moved + work.word * work.words)


def _field(
    steps: Mapping[str, Any], work: Workload, ball: Ball, ids: Tensor, grads: Sequence[Tensor], moved: int
) -> Field:
    """The second step of each, made when it is asked for; its answer is how far both have moved the embeddings."""

    def entry(make: Any) -> Entry:
        made = cache(lambda: make(work.weight, ids, ball))
        return Entry(
            lambda: (made().reset(), made().step(grads[0])),
            lambda: made().step(grads[1]),
            lambda: made().step(grads[1]) - work.weight[ids],
            waits=make in (ClassicStep, BestStep),
        )

    return Field({name: entry(make) for name, make in steps.items()}, moved, work.shape)
