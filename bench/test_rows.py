"""A table moved in place, as the classic calls and `tied="both"` do: back-up, step and restore, all rows or some."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import vector_norm

from bench import cases
from bench.cases import RULE, Workload
from bench.contest import Field
from bench.race import LIMIT, Entry
from bench.workloads import Size


def _formula(kept: Tensor, grad: Tensor, saved: Tensor) -> Tensor:
    r = kept + RULE["step_size"] * grad / vector_norm(grad) - saved
    return saved + r * (RULE["epsilon"] / vector_norm(r)).clamp(max=1)


_compiled = torch.compile(_formula, dynamic=False)


def copy(shape: Any, what: str, device: str) -> Field:
    """A copy is a copy: into a new tensor, or back."""
    work = Workload(shape, device)
    kept, saved = work.flat.clone(), work.flat.clone()
    case = cases.row(what, some=False)(work)
    plain = kept.clone if what == "back_up" else lambda: kept.copy_(saved)
    return Field({"torch": Entry(lambda: None, plain), "fused": case.entry()}, case.moved, shape)


def step(shape: Any, device: str) -> Field:
    """`reference`: as the script has it; `torch`: in place, norms as factors."""
    work = Workload(shape, device)
    before, grad = work.flat.clone(), work.grads[1].flatten(0, 1)
    kept, saved = before.clone(), before.clone()

    def in_place() -> Tensor:
        kept.add_(grad, alpha=RULE["step_size"] / float(vector_norm(grad))).sub_(saved)
        return kept.mul_(min(1.0, RULE["epsilon"] / float(vector_norm(kept)))).add_(saved)

    def reset() -> None:
        kept.copy_(before)

    case = cases.row("step", some=False)(work)
    entries = {
        "reference": Entry(reset, lambda: _formula(kept, grad, saved)),
        "torch": Entry(reset, in_place),
        "compiled": Entry(reset, lambda: _compiled(kept, grad, saved)),
        "fused": case.entry(),
    }
    return Field(entries, case.moved, shape)


@pytest.mark.models("BERT-base")
@pytest.mark.parametrize("contestant", ["torch", "fused", LIMIT])
@pytest.mark.parametrize("what", ["back_up", "restore"])
def test_copies(contest: Any, size: Size, device: str, model: str, what: str, contestant: str) -> None:
    contest(f"rows, {what}", contestant, lambda: copy(size.shapes[model], what, device))


@pytest.mark.models("BERT-base")
@pytest.mark.parametrize("contestant", ["reference", "torch", "compiled", "fused", LIMIT])
def test_step(contest: Any, size: Size, device: str, model: str, contestant: str) -> None:
    contest("rows, step", contestant, lambda: step(size.shapes[model], device))
