"""`segment_sum` and its sort."""

from __future__ import annotations

import pytest
import torch

from fastadv import native
from fastadv.ops import segment_sum, segments
from fastadv.ops.segment_sum import OP, PLAN_OP, segments_on_cuda

IDS = {
    "repeats": [3, 1, 3, 3, 0, 1],
    "one": [4],
    "all equal": [2, 2, 2],
    "all different": [4, 3, 2, 1, 0],
    "none": [],
    "more than the table": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 4],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_sums_equal_ids(ids: list[int], dtype: torch.dtype) -> None:
    vocabulary, width = 5, 7
    values = torch.randn(len(ids), width).to(dtype)
    groups = segments(torch.tensor(ids, dtype=torch.int64), vocabulary)
    sums = segment_sum(values, groups)
    assert sums.shape == (min(len(ids), vocabulary), width)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    table = torch.zeros(vocabulary, width, dtype=torch.float64)
    table.index_add_(0, torch.tensor(ids, dtype=torch.int64), values.double())
    distinct = sorted(set(ids))
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    assert torch.allclose(sums[: len(distinct)].double(), table[distinct], rtol=tolerance, atol=tolerance)
    assert (sums[len(distinct) :] == 0).all()


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_slot_leads_each_position_to_its_row(ids: list[int]) -> None:
    groups = segments(torch.tensor(ids, dtype=torch.int64), 5)
    assert groups.slot.tolist() == [sorted(set(ids)).index(i) for i in ids]
    assert groups.starts[-1] == len(ids)
    assert sorted(groups.order.tolist()) == list(range(len(ids)))


def test_low_precision_is_summed_in_float32() -> None:
    values = torch.cat([torch.full((1, 1), 256.0), torch.ones(200, 1)]).bfloat16()  # 256 + 1 is 256 in bfloat16
    sums = segment_sum(values, segments(torch.zeros(201, dtype=torch.int64), 4))
    assert sums[0].item() == 456


def test_repeats_bit_for_bit() -> None:
    ids, values = torch.randint(0, 20, (500,)), torch.randn(500, 33)
    first = segment_sum(values, segments(ids, 20))
    assert all(torch.equal(segment_sum(values, segments(ids, 20)), first) for _ in range(3))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS.keys())
def test_masked_positions_come_last_and_have_no_slot(ids: list[int], fused: bool | None) -> None:
    words, mask = torch.tensor(ids, dtype=torch.int64), torch.rand(len(ids)) < 0.5
    groups = segments(words, 5, mask=mask, fused=fused)
    want = sorted(range(len(ids)), key=lambda i: (ids[i], not mask[i], i))
    assert groups.order.tolist() == want
    distinct = sorted(set(ids))
    assert groups.slot.tolist() == [distinct.index(w) if m else -1 for w, m in zip(ids, mask, strict=True)]
    for s, word in enumerate(distinct):
        here = groups.order[groups.starts[s] : groups.starts[s + 1]]
        assert (words[here] == word).all()
        assert groups.stops[s] - groups.starts[s] == mask[here].sum()
    assert (groups.starts[len(distinct) :] == len(ids)).all()
    assert (groups.stops[len(distinct) :] == len(ids)).all()


@pytest.mark.parametrize("fused", [None, False])
def test_a_batch_is_flattened_and_a_nan_that_is_masked_stays_out(fused: bool | None) -> None:
    ids, mask = torch.tensor([[3, 3], [1, 3]]), torch.tensor([[True, False], [True, True]])
    values = torch.arange(1.0, 5.0).view(2, 2, 1).clone()
    values[0, 1] = torch.nan
    groups = segments(ids, 9, mask=mask, fused=fused)
    assert segment_sum(values, groups, fused=fused).flatten().tolist() == [3, 5, 0, 0]
    scalar = torch.ones(()).expand(2, 2, 6)
    assert segment_sum(scalar, groups, fused=fused)[:, 5].tolist() == [1, 2, 0, 0]


def test_bad_arguments() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(TypeError, match="ids must be int64 or int32"):
        segments(ids.float(), 5)
    with pytest.raises(TypeError, match="mask must be bool"):
        segments(ids, 5, mask=ids)
    with pytest.raises(ValueError, match=r"mask has shape \(1,\)"):
        segments(ids, 5, mask=torch.tensor([True]))
    with pytest.raises(ValueError, match="cannot be -1"):
        segments(ids, -1)
    for fused in (None, False):
        with pytest.raises(IndexError, match=r"id 2 .* 2 rows"):
            segments(ids, 2, fused=fused)


def test_on_cuda_the_sort_is_pytorchs() -> None:
    """So that `fused=True` can be kept there."""
    assert PLAN_OP.choose("cuda", True) is segments_on_cuda
    if native.available():
        assert PLAN_OP.choose("cpu", None) is not PLAN_OP.eager
        assert OP.choose("cpu", None) is not OP.eager


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("ids", [*IDS.values(), [2**30 + 1, 3, 2**30, 2**30 + 1]], ids=[*IDS, "large"])
def test_what_cuda_runs_is_the_eager_plan(ids: list[int], dtype: torch.dtype, masked: bool) -> None:
    """Of memory with gaps, too; against a plan by hand."""
    flat = torch.tensor(ids, dtype=dtype).repeat_interleave(2)[::2]
    mask = torch.tensor([index % 3 != 1 for index in range(len(ids))], dtype=torch.bool) if masked else None
    vocabulary = max([4, *ids]) + 1
    found, eager = segments_on_cuda(flat, mask, vocabulary), PLAN_OP.eager(flat, mask, vocabulary)
    assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(found, eager, strict=True))
    live = [True] * len(ids) if mask is None else mask.tolist()
    distinct = sorted(set(ids))
    order = sorted(range(len(ids)), key=lambda index: (ids[index], not live[index], index))
    assert found.order.tolist() == order
    assert found.slot.tolist() == [distinct.index(one) if there else -1 for one, there in zip(ids, live, strict=True)]
    starts = [sum(other < one for other in ids) for one in distinct]
    counts = [sum(other == one and there for other, there in zip(ids, live, strict=True)) for one in distinct]
    rest = len(found.stops) - len(distinct)
    assert found.starts.tolist() == [*starts, len(ids), *[len(ids)] * rest]
    assert found.stops.tolist() == [a + b for a, b in zip(starts, counts, strict=True)] + [len(ids)] * rest


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])], ids=["no mask", "mask"])
def test_opcheck(mask: torch.Tensor | None) -> None:
    ids = torch.tensor([3, 1, 3])
    torch.library.opcheck(torch.ops.fastadv.segments.default, (ids, mask, 5))
    torch.library.opcheck(torch.ops.fastadv.segments.default, (ids.int(), mask, 2**40))
    groups = segments(ids, 5, mask=mask)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(3, 4).to(dtype)
        arguments = (values, groups.order, groups.starts, groups.stops)
        torch.library.opcheck(torch.ops.fastadv.segment_sum.default, arguments)
