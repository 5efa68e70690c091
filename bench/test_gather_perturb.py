"""The perturbed lookup W[ids] + delta, and the table's gradient on the rows that a batch touches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import cases
from bench.attack_steps import prepare_rows
from bench.cases import Workload
from bench.contest import Field
from bench.race import LIMIT, Entry
from bench.workloads import MAIN, Size

FORWARD = ("reference", "torch", "compiled", "fused", LIMIT)
BACKWARD = ("reference", "torch", "fused", LIMIT)


@torch.compile(dynamic=False)
def _compiled(weight: Tensor, ids: Tensor, delta: Tensor) -> Tensor:
    return F.embedding(ids, weight) + delta


def forward(shape: Any, device: str) -> Field:
    """`reference`: a lookup, and a sum; `torch`: the sum in place."""
    work = Workload(shape, device)
    weight, ids, delta = work.weight, work.ids, work.start
    out = torch.empty_like(delta)

    def in_place() -> Tensor:
        torch.index_select(weight, 0, ids.flatten(), out=out.view(-1, out.shape[-1]))
        return out.add_(delta)

    case = cases.gather(work)
    entries = {
        "reference": Entry(work.rotate, lambda: F.embedding(ids, weight) + delta),
        "torch": Entry(work.rotate, in_place),
        "compiled": Entry(work.rotate, lambda: _compiled(weight, ids, delta)),
        "fused": case.entry(),
    }
    return Field(entries, case.moved, shape, tolerance=1e-6, rewind=work.rewind)


def backward(shape: Any, device: str) -> Field:
    """`reference`: autograd's dense gradient, accumulated; `torch`: a bag's sums, added to the rows that there are."""
    work = Workload(shape, device)
    into, ids, rows = torch.zeros_like(work.weight), work.ids.flatten(), prepare_rows(work.ids)

    def dense() -> Tensor:
        grad = torch.ops.aten.embedding_dense_backward(work.flat, ids, len(into), -1, False)
        return into.add_(grad)

    def touched() -> Tensor:
        summed = F.embedding_bag(rows.order, work.flat, rows.starts, mode="sum")
        return into.index_add_(0, rows.unique, summed)

    def reset() -> None:
        into.zero_()
        work.rotate()

    case = cases.backward(work)
    entries = {"reference": Entry(reset, dense), "torch": Entry(reset, touched), "fused": case.entry()}
    return Field(entries, case.moved, shape, rewind=work.rewind)


@pytest.mark.parametrize("contestant", FORWARD)
def test_gather_perturb(contest: Any, size: Size, device: str, model: str, contestant: str) -> None:
    contest(f"gather_perturb, {model}", contestant, lambda: forward(size.shapes[model], device))


@pytest.mark.models(*MAIN)
@pytest.mark.parametrize("contestant", BACKWARD)
def test_backward(contest: Any, size: Size, device: str, model: str, contestant: str) -> None:
    make = lambda: backward(size.shapes[model], device)  # noqa: E731
    contest(f"gather_perturb's backward, {model}", contestant, make)
