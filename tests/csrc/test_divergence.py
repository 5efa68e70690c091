"""csrc/divergence by itself: its buffers, its threads, and what its launcher refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments.kinds import KINDS
from fastadv.native.divergence import divergence

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rows(count: int, classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.rand(count, dtype=torch.promote_types(dtype, torch.float32))
    return (3 * torch.randn(count, classes)).to(dtype), torch.randn(count, classes).to(dtype), weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_nothing(kind: str, dtype: torch.dtype) -> None:
    logits, target, weights = rows(50, 999, dtype)
    alone = divergence(logits, target, weights, kind, True, True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for one, other in zip(divergence(logits, target, weights, kind, True, True), alone, strict=True):
            assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_lie_apart_or_are_all_the_same(kind: str, dtype: torch.dtype) -> None:
    logits, target, weights = rows(8, 37, dtype)
    spread = torch.full((8, 50), torch.nan, dtype=dtype)
    spread[:, 7:44] = logits
    same = target[:1].expand(8, 37)
    got = divergence(spread[:, 7:44], same, weights, kind, True, True)
    want = divergence(logits, same.contiguous(), weights, kind, True, True)
    assert all(map(torch.equal, got, want))
    assert spread[:, :7].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_row_by_itself(dtype: torch.dtype) -> None:
    """NaN in one row is in that row's results, and nowhere else."""
    logits, target, weights = rows(5, 300, dtype)
    for kind in KINDS:
        want = divergence(logits, target, weights, kind, True, True)
        bad = logits.clone()
        bad[2, 299] = torch.nan
        got = divergence(bad, target, weights, kind, True, True)
        keep = torch.arange(5) != 2
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one[keep], other[keep])
            assert one[2].isnan().any()


def test_wrong_calls() -> None:
    logits, target, weights = rows(3, 5, torch.float32)

    def refused(error: type[Exception], match: str, **changed: Any) -> None:
        arguments = {"logits": logits, "target": target, "weights": weights, "kind": "kl", **changed}
        with pytest.raises(error, match=match):
            divergence(**arguments, for_logits=True, for_target=True)

    refused(ValueError, "kind must be one of", kind="mean")
    refused(TypeError, "logits is torch.int64, but must be one of", logits=logits.long())
    refused(TypeError, "target must be torch.float32", target=target.double())
    refused(ValueError, r"target must have shape \(3, 5\)", target=target[:, :4])
    refused(ValueError, "adjacent elements", logits=logits.t().contiguous().t())
    refused(TypeError, "weights must be torch.float32 for logits of torch.float32", weights=weights.double())
    refused(ValueError, r"weights must have shape \(3,\)", weights=weights[:2])
    refused(ValueError, "logits must have shape", logits=logits[0])
