"""Tensors that lie oddly in memory: at addresses that fit no number, without elements, over one another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastadv import native, ops
from fastadv.arguments.rule import Rule
from tests.campaigns.fuzz_ops import misaligned

RULE = Rule(0.3, 0.5, "l2", "l2", 0)._asdict()
IDS = torch.tensor([3, 1, 3, 0])
needs_native = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")


def counter() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


@pytest.mark.native
@needs_native
def test_misaligned_tensors_give_what_others_do() -> None:
    """Those that are written as well, in place."""
    delta, grad, table, out = torch.zeros(4, 3), torch.randn(4, 3), torch.randn(5, 3), torch.zeros(4, 3)
    odd_delta, odd_out = misaligned(delta), misaligned(out)
    assert odd_delta.data_ptr() % 4 == 1
    ops.ascend(delta, grad, skipped=counter(), weight=table, ids=IDS, embedded=out, **RULE)
    odd = {"weight": misaligned(table), "ids": misaligned(IDS), "embedded": odd_out}
    skipped, version = misaligned(counter()), odd_delta._version
    ops.ascend(odd_delta, misaligned(grad), skipped=skipped, **odd, **RULE)
    assert odd_delta._version > version
    assert torch.equal(delta, odd_delta)
    assert torch.equal(out, odd_out)
    ops.ascend(odd_delta, misaligned(grad * torch.nan), skipped=skipped, **RULE)
    assert skipped == 1
    into = [misaligned(torch.zeros(3)), torch.zeros(3)]
    plan = ops.grads.Plan(into, [torch.ones(3), misaligned(torch.ones(3))])
    plan.accumulate(0.5)
    ops.grads.ACCUMULATE.choose("cpu", True)(into, [torch.ones(3), misaligned(torch.ones(3))], 0.25)
    assert [one.tolist() for one in into] == [[0.75] * 3] * 2


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Without elements, and all strides zero, as expanded tensors have them."""
    return torch.empty(0, dtype=dtype).as_strided(shape, (0,) * len(shape))


@pytest.mark.parametrize("fused", [None, False])
def test_tensors_without_elements_may_have_any_strides(fused: bool | None) -> None:
    table, no_ids = nothing(0, 5), nothing(0, dtype=torch.int64)
    assert ops.gather_perturb(table, no_ids, nothing(0, 5), added=nothing(0, 5), fused=fused).shape == (0, 5)
    assert ops.divergence(nothing(0, 5), nothing(0, 5), "kl", fused=fused) == 0
    assert ops.rows.touched(table, fused=fused).shape == (0,)
    ops.rows.restore(table, nothing(0, 5), fused=fused)
    ops.rows.step(table, nothing(0, 5), saved=nothing(0, 5), skipped=counter(), fused=fused, **RULE)
    groups = ops.segments(no_ids, 0, fused=fused)
    assert ops.segment_sum(nothing(0, 5), groups, fused=fused).shape == (0, 5)
    ops.gather_perturb_backward(table, [nothing(0, 5)], no_ids, groups, fused=fused)
    ops.ascend(nothing(0, 5), nothing(0, 5), skipped=counter(), fused=fused, **RULE)


@pytest.mark.native
@needs_native
def test_what_is_written_may_not_lie_over_what_is_read() -> None:
    """An index that is written over would point anywhere."""
    room = torch.zeros(12, dtype=torch.int64)
    ids, embedded = room[:4], room.view(torch.float32)[:12].view(4, 3)
    with pytest.raises(ValueError, match=r"embedded is written in place, but shares memory with ids; pass a clone"):
        ops.ascend(
            torch.zeros(4, 3), torch.ones(4, 3), skipped=counter(), weight=torch.ones(5, 3), ids=ids, embedded=embedded,
            **RULE,
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"table is written in place, but shares memory with saved"):
        ops.rows.restore(embedded, embedded)
    both = torch.randn(6, 8)  # two tables, side by side
    left, right = both[:, :3], both[:, 3:6]
    ops.rows.restore(left, torch.zeros(6, 3))
    ops.rows.step(left, right, skipped=counter(), **{**RULE, "ball": "none"})
    assert left.norm().sub(0.3).abs() < 1e-6
