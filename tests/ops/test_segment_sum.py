"""`segment_sum` and its sort."""

from __future__ import annotations

import pytest
import torch

from fastadv.ops import segment_sum, segments

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


def test_opcheck() -> None:
    groups = segments(torch.tensor([3, 1, 3]), 5)
    arguments = (torch.randn(3, 4), groups.order, groups.starts, groups.stops)
    torch.library.opcheck(torch.ops.fastadv.segment_sum.default, arguments)
