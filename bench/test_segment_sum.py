"""Equal ids: the sort that a batch needs once, and the sums over them that every step needs."""

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
from fastadv import ops


@torch.compile(dynamic=False)
def _compiled(into: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
    return torch.zeros_like(into).index_add(0, inverse, grad)


def sums(shape: Any, device: str) -> Field:
    """`reference`: `index_add_`; `torch`: a bag over sorted positions; what is compiled scatters as the first does."""
    work = Workload(shape, device)
    rows = prepare_rows(work.ids)
    into = work.grad.new_zeros(len(rows.unique), shape.dimension)
    case = cases.segment_sum(work)
    entries = {
        "reference": Entry(work.rotate, lambda: torch.zeros_like(into).index_add_(0, rows.inverse, work.flat)),
        "torch": Entry(work.rotate, lambda: F.embedding_bag(rows.order, work.flat, rows.starts, mode="sum")),
        "compiled": Entry(work.rotate, lambda: _compiled(into, rows.inverse, work.flat)),
        "fused": Entry(case.reset, lambda: case.run()[: len(into)]),
    }
    return Field(entries, case.moved, shape, rewind=work.rewind)


def sort(shape: Any, device: str) -> Field:
    """Once per batch. `reference`: `unique`, which is all that `index_add_` needs; `torch`: what a bag needs."""
    work = Workload(shape, device)
    ids = work.ids.flatten()
    entries = {
        "reference": Entry(work.rotate, lambda: ids.unique(return_inverse=True)[1]),
        "torch": Entry(work.rotate, lambda: prepare_rows(ids).inverse),
        "fused": Entry(work.rotate, lambda: ops.segments(ids, shape.vocabulary, fused=True).slot),
    }
    return Field(entries, None, shape, rewind=work.rewind)


@pytest.mark.models(*MAIN)
@pytest.mark.parametrize("contestant", ["reference", "torch", "compiled", "fused", LIMIT])
def test_segment_sum(contest: Any, size: Size, device: str, model: str, contestant: str) -> None:
    contest(f"segment_sum, {model}", contestant, lambda: sums(size.shapes[model], device))


@pytest.mark.models(*MAIN)
@pytest.mark.parametrize("contestant", ["reference", "torch", "fused"])
def test_segments(contest: Any, size: Size, device: str, model: str, contestant: str) -> None:
    contest(f"a batch's sort, {model}", contestant, lambda: sort(size.shapes[model], device))
