"""fastadv's ops, each as a case: what runs, what it starts from, and the bytes that it has to move.

A norm over many rows must be known before anything is written, so that what is larger than the caches is read twice:
`passes` is 2 where that is so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.race import Entry
from bench.workloads import Shape, gradient, table, zipf
from fastadv import ops
from fastadv.ops import grads, rows
from fastadv.ops.gather_perturb import OP as GATHER

RULE: dict[str, Any] = {"step_size": 0.3, "epsilon": 0.2, "direction": "l2", "ball": "l2"}
GROUPS = {"batch": 0, "sample": 1, "token": 2}


class Case(NamedTuple):
    """One op on one workload."""

    run: Callable[[], Any]
    moved: int  # bytes
    reset: Callable[[], object] = lambda: None

    def entry(self) -> Entry:
        return Entry(self.reset, self.run)


class Workload:
    """Words of `dtype`, a float32 perturbation and its start, which a step has left at the edge of the ball."""

    def __init__(self, shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, passes: int = 1) -> None:
        self.shape, self.device, self.passes = shape, device, passes
        self.ids = zipf(shape.batch, shape.length, shape.vocabulary).to(device)
        self.weight = table(shape.vocabulary, shape.dimension, device).to(dtype)
        self.grads = [self.gradient(seed).to(dtype) for seed in (2, 3)]  # they rotate: no run sees the last one's
        self.start = self.gradient(4)
        self.start *= 0.9 * RULE["epsilon"] / self.start.norm()
        self.turn = 0
        self.groups = ops.segments(self.ids.flatten(), shape.vocabulary)
        if device == "cpu":
            self.groups = self.groups.trimmed()
        self.distinct = len(self.ids.unique())
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def gradient(self, seed: int) -> Tensor:
        return gradient(*self.ids.shape, self.shape.dimension, device=self.device, seed=seed)

    def rotate(self) -> None:
        """The next gradient."""
        self.turn += 1

    def rewind(self) -> None:
        """The first gradient again."""
        self.turn = 0

    @property
    def grad(self) -> Tensor:
        """[B, T, D], of this turn."""
        return self.grads[self.turn % len(self.grads)]

    @property
    def flat(self) -> Tensor:
        """[B * T, D], of this turn."""
        return self.grad.flatten(0, 1)

    @property
    def word(self) -> int:
        """Bytes of an element of the table."""
        return self.weight.element_size()

    @property
    def positions(self) -> int:
        """Elements of the batch."""
        return self.ids.numel() * self.shape.dimension

    @property
    def words(self) -> int:
        """Elements of its distinct rows."""
        return self.distinct * self.shape.dimension


def gather(work: Workload) -> Case:
    run, ids, delta = GATHER.choose(work.device, None), work.ids, work.start
    moved = (4 + work.word) * work.positions + work.word * work.words
    return Case(lambda: run(work.weight, ids, delta, None), moved)


def backward(work: Workload) -> Case:
    into, ids = torch.zeros_like(work.weight), work.ids.flatten()
    moved = work.word * work.positions + 2 * work.word * work.words

    def run() -> Tensor:
        ops.gather_perturb_backward(into, [work.flat], ids, work.groups)
        return into

    return Case(run, moved, lambda: (into.zero_(), work.rotate()))


def ascend(scope: str, embeds: bool) -> Callable[[Workload], Case]:
    group = GROUPS[scope]

    def build(work: Workload) -> Case:
        delta, out = work.start.clone(), torch.empty_like(work.grad)
        lookup: dict[str, Any] = {"weight": work.weight, "ids": work.ids, "embedded": out} if embeds else {}
        reads = 1 if group == GROUPS["token"] else work.passes
        moved = (reads * (work.word + 4) + 4) * work.positions
        moved += work.word * (work.positions + work.words) if embeds else 0

        def run() -> Tensor:
            ops.ascend(delta, work.grad, skipped=work.skipped, group=group, **RULE, **lookup)
            return out if embeds else delta

        return Case(run, moved, lambda: (delta.copy_(work.start), work.rotate()))

    return build


def segments(work: Workload) -> Case:
    ids, vocabulary = work.ids.flatten(), work.shape.vocabulary
    return Case(lambda: ops.segments(ids, vocabulary), 8 * ids.numel() * 5)


def segment_sum(work: Workload) -> Case:
    moved = work.word * work.positions + 4 * work.words
    return Case(lambda: ops.segment_sum(work.flat, work.groups), moved, work.rotate)


def table_step(work: Workload) -> Case:
    r = torch.zeros(len(work.groups.stops), work.shape.dimension, device=work.device)
    out = work.grad.new_empty(work.ids.numel(), work.shape.dimension)
    lookup = {"weight": work.weight, "ids": work.ids.flatten(), "embedded": out, "room": torch.empty_like(r)}
    moved = 2 * work.word * work.positions + (8 + work.word) * work.words
    moved += 16 * (work.passes - 1) * work.words  # the sums go through memory, where caches are too small

    def run() -> Tensor:
        ops.table_step(r, work.flat, work.groups, skipped=work.skipped, group=0, **RULE, **lookup)
        return out

    return Case(run, moved, lambda: (r.zero_(), run(), work.rotate()))


def row(what: str, some: bool) -> Callable[[Workload], Case]:
    """On a table of as many rows as the batch has positions, or on every third of them."""

    def build(work: Workload) -> Case:
        before, grad = work.flat.clone(), work.grads[1].flatten(0, 1)
        kept, chosen = before.clone(), torch.arange(0, len(before), 3, device=work.device) if some else None
        saved = rows.back_up(kept, chosen)
        elements = saved.numel()
        if what == "back_up":
            return Case(lambda: rows.back_up(kept, chosen), 2 * work.word * elements)
        if what == "restore":

            def restore() -> Tensor:
                rows.restore(kept, saved, chosen)
                return kept

            return Case(restore, 2 * work.word * elements)
        rule = {**RULE, "skipped": work.skipped, "saved": saved, "rows": chosen}

        def step() -> Tensor:
            rows.step(kept, grad, **rule)
            return kept

        return Case(step, (3 * work.passes + 1) * work.word * elements, lambda: kept.copy_(before))

    return build


class Gradients:
    """As many as a model has: what they start from, and what comes."""

    def __init__(self, count: int, elements: int, device: str = "cpu") -> None:
        drawn = [gradient(elements, device=device, seed=seed) for seed in (2, 3)]
        self.start = [drawn[0].clone() for _ in range(count)]
        self.into = [one.clone() for one in self.start]
        self.sources = [drawn[1].clone() for _ in range(count)]
        self.elements = count * elements

    def reset(self) -> None:
        torch._foreach_copy_(self.into, self.start)


def gradients(what: str, tensors: int) -> Callable[[Gradients], Case]:
    """`tensors`: how many it reads and writes for each that there is."""

    def build(work: Gradients) -> Case:
        plan, numbers = grads.Plan(work.into, work.sources), () if what == "copy" else (0.5,)

        def run() -> list[Tensor]:
            getattr(plan, what)(*numbers)
            return work.into

        return Case(run, 4 * tensors * work.elements, work.reset)

    return build


def divergence(wants: int) -> Callable[[Workload], Case]:
    """Symmetric KL of a table's worth of classes, with the gradients by both sides or by one."""

    def build(work: Workload) -> Case:
        count = 4 * work.shape.length
        logits = torch.randn(count, work.shape.vocabulary, dtype=work.weight.dtype, device=work.device).requires_grad_()
        target = (logits.detach() + 0.1).requires_grad_(wants == 2)
        return Case(lambda: ops.divergence(logits, target), work.word * (2 + wants) * logits.numel())

    return build


OPS: dict[str, Callable[[Workload], Case]] = {
    "gather_perturb": gather,
    "gather_perturb_backward": backward,
    "ascend, token": ascend("token", False),
    "ascend, token, and the words": ascend("token", True),
    "ascend, sample": ascend("sample", False),
    "ascend, sample, and the words": ascend("sample", True),
    "ascend, batch": ascend("batch", False),
    "segments": segments,
    "segment_sum": segment_sum,
    "table_step": table_step,
    "divergence": divergence(2),
    "divergence from a constant": divergence(1),
    "rows back_up": row("back_up", some=False),
    "rows back_up, every third": row("back_up", some=True),
    "rows restore": row("restore", some=False),
    "rows restore, every third": row("restore", some=True),
    "rows step": row("step", some=False),
}
GRADIENTS: dict[str, Callable[[Gradients], Case]] = {
    "grads copy": gradients("copy", 2),
    "grads accumulate": gradients("accumulate", 3),
    "grads average": gradients("average", 3),
}
