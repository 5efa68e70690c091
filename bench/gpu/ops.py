"""Every op at a size that no cache holds, against the copy of the same run.

An op's bytes are those that it has to move. A norm over many rows must be known before anything is written, so that
what is larger than the caches is read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.clock import captured, device_race, microseconds
from bench.race import Copy, Entry, Run
from bench.workloads import zipf
from fastadv import ops
from fastadv.ops import grads, rows
from fastadv.ops.gather_perturb import OP as GATHER


class Size(NamedTuple):
    """Of one batch, its table, and a model's gradients."""

    batch: int
    length: int
    dim: int
    vocabulary: int
    tensors: int
    elements: int  # of each


SIZES = {"full": Size(256, 512, 1024, 30_522, 200, 600_000), "tiny": Size(4, 16, 32, 50, 5, 300)}
RULE: dict[str, Any] = {"step_size": 0.3, "epsilon": 0.2, "direction": "l2", "ball": "l2"}


class Case(NamedTuple):
    run: Run
    bytes: int


class Workload:
    """bfloat16 words, a float32 perturbation."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.ids = zipf(size.batch, size.length, size.vocabulary).to(device)
        self.weight = self.randn(size.vocabulary, size.dim)
        self.grad = self.randn(size.batch, size.length, size.dim)
        self.out = torch.empty_like(self.grad)
        self.groups = ops.segments(self.ids.flatten(), size.vocabulary)
        self.distinct = len(self.ids.unique())
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def randn(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device)

    @property
    def positions(self) -> int:
        return self.ids.numel() * self.size.dim

    @property
    def words(self) -> int:
        return self.distinct * self.size.dim


def gather(work: Workload) -> Case:
    delta, run = work.zeros(*work.grad.shape), GATHER.choose(work.device.type, None)
    return Case(lambda: run(work.weight, work.ids, delta, None), (4 + 2) * work.positions + 2 * work.words)


def ascend(group: int, embeds: bool) -> Callable[[Workload], Case]:
    def build(work: Workload) -> Case:
        delta = work.zeros(*work.grad.shape)
        words: dict[str, Any] = {"weight": work.weight, "ids": work.ids, "embedded": work.out} if embeds else {}
        reads = 1 if group == 2 else 2
        moved = (reads * (2 + 4) + 4) * work.positions + (2 * work.positions + 2 * work.words if embeds else 0)
        return Case(lambda: ops.ascend(delta, work.grad, skipped=work.skipped, group=group, **RULE, **words), moved)

    return build


def segment_sum(work: Workload) -> Case:
    grad = work.grad.flatten(0, 1)
    return Case(lambda: ops.segment_sum(grad, work.groups), 2 * work.positions + 4 * work.words)


def segments(work: Workload) -> Case:
    ids, vocabulary = work.ids.flatten(), work.size.vocabulary
    return Case(lambda: ops.segments(ids, vocabulary), 8 * ids.numel() * 5)


def backward(work: Workload) -> Case:
    into, grad, ids = torch.zeros_like(work.weight), work.grad.flatten(0, 1), work.ids.flatten()
    moved = 2 * work.positions + 4 * work.words
    return Case(lambda: ops.gather_perturb_backward(into, [grad], ids, work.groups), moved)


def table_step(work: Workload) -> Case:
    r = work.zeros(len(work.groups.stops), work.size.dim)
    rest = {"weight": work.weight, "ids": work.ids, "embedded": work.out, "room": torch.empty_like(r)}
    grad = work.grad.flatten(0, 1)
    moved = (2 + 2) * work.positions + (4 + 2 * 8 + 4 + 2) * work.words
    return Case(lambda: ops.table_step(r, grad, work.groups, skipped=work.skipped, group=0, **RULE, **rest), moved)


def row(what: str, some: bool) -> Callable[[Workload], Case]:
    def build(work: Workload) -> Case:
        table = work.randn(work.ids.numel(), work.size.dim)
        chosen = torch.arange(0, len(table), 3, device=work.device) if some else None
        saved = rows.back_up(table, chosen)
        elements = saved.numel()
        if what == "back_up":
            return Case(lambda: rows.back_up(table, chosen), 4 * elements)
        if what == "restore":
            return Case(lambda: rows.restore(table, saved, chosen), 4 * elements)
        grad = torch.randn_like(table)
        rule = {**RULE, "skipped": work.skipped, "saved": saved, "rows": chosen}
        return Case(lambda: rows.step(table, grad, **rule), (2 * 6 + 2) * elements)

    return build


def gradients(what: str, tensors: int) -> Callable[[Workload], Case]:
    def build(work: Workload) -> Case:
        count, elements = work.size.tensors, work.size.elements
        into, sources = ([work.zeros(elements) for _ in range(count)] for _ in range(2))
        plan = grads.Plan(into, sources)
        numbers = () if what == "copy" else (0.5,)
        return Case(lambda: getattr(plan, what)(*numbers), 4 * tensors * count * elements)

    return build


def divergence(wants: int) -> Callable[[Workload], Case]:
    """Symmetric KL of a table's worth of classes, with the gradients by both sides or by one."""

    def build(work: Workload) -> Case:
        logits = work.randn(4 * work.size.length, work.size.vocabulary).requires_grad_()
        target = (logits.detach() + 0.1).requires_grad_(wants == 2)
        moved = 2 * (2 + wants) * logits.numel()
        return Case(lambda: ops.divergence(logits, target), moved)

    return build


CASES: dict[str, Callable[[Workload], Case]] = {
    "gather_perturb": gather,
    "gather_perturb_backward": backward,
    "ascend, token": ascend(2, False),
    "ascend, token, and the words": ascend(2, True),
    "ascend, sample": ascend(1, False),
    "ascend, sample, and the words": ascend(1, True),
    "ascend, batch": ascend(0, False),
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
    "grads copy": gradients("copy", 2),
    "grads accumulate": gradients("accumulate", 3),
    "grads average": gradients("average", 3),
}


def measured(size: Size, device: torch.device, copy: Copy, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each op's figures, as soon as they are there."""
    work = Workload(size, device)
    for name, build in CASES.items():
        run, moved = build(work)
        result = device_race({name: Entry(lambda: None, captured(run))}, rounds, copy)
        us = microseconds(result)[name]
        gbps = moved / us / 1e3
        share = gbps / (result.bandwidth / 1e9)
        yield name, {"bytes": moved, "us": us, "gbps": round(gbps, 1), "share_of_copy": round(share, 3)}
