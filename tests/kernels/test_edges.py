"""Where the kernels divide their work: segments of more than a chunk, rows that begin between multiples of 16 bytes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastadv import kernels
from fastadv.arguments.kinds import KINDS
from fastadv.native.flags import check
from fastadv.ops import segments
from fastadv.ops.divergence import eager as plain_divergence

if not (kernels.interpreted() or torch.cuda.is_available()):
    pytest.skip("neither interpreted (--backend triton) nor on a GPU", allow_module_level=True)

from fastadv.kernels.ascend import MOVERS, PROGRAMS, cut
from fastadv.kernels.divergence import MOST, divergence
from fastadv.kernels.gather_perturb import gather_perturb_backward
from fastadv.kernels.segment_sum import CHUNK, FEW, segment_sum

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    error = (got.double().cpu() - want.double().cpu()).norm()
    assert error <= tolerance * max(1.0, float(want.double().norm())), float(error)


WORDS = 9
LENGTHS = [
    [CHUNK],
    [CHUNK + 1],
    [1, CHUNK, 2 * CHUNK, 1],  # one that begins behind a chunk's first position, and ends there
    [CHUNK, CHUNK + 1, 3],  # one that begins with a chunk
    [3 * CHUNK, 5],
    [CHUNK - 1, CHUNK + 1, FEW, FEW + 1, 1],
    [5, 6 * CHUNK + 7, 2, CHUNK, CHUNK + 2],
]


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [*itertools.product(LENGTHS, (torch.float32, torch.bfloat16)), (LENGTHS[-1], torch.float64)],
    ids=str,
)
def test_segments_of_more_than_a_chunk(lengths: list[int], dtype: torch.dtype) -> None:
    """Each row counts once, in sums of small whole numbers, which no order of adding changes."""
    ids = torch.repeat_interleave(torch.tensor(lengths))
    ids = (ids + 3)[torch.randperm(len(ids))].to(DEVICE)
    mask = torch.rand(len(ids), device=DEVICE) < 0.95
    values = torch.randint(-3, 4, (len(ids), 70)).to(dtype).to(DEVICE)
    for masked in (None, mask):
        groups = segments(ids, WORDS, mask=masked, fused=False)
        kept = values.double() if masked is None else torch.where(masked[:, None], values.double(), 0)
        want = torch.zeros(WORDS, 70, dtype=torch.float64, device=DEVICE).index_add_(0, ids, kept)
        given = values if masked is None else torch.where(masked[:, None], values, math.nan)
        sums = segment_sum(given, groups.order, groups.starts, groups.stops)
        assert torch.equal(sums.double()[: len(lengths)], want[3 : 3 + len(lengths)])
        assert not sums[len(lengths) :].any()
    table = torch.zeros(WORDS, 70, dtype=dtype, device=DEVICE)
    groups = segments(ids, WORDS, fused=False)
    gather_perturb_backward(table, [values, values.to(wide(dtype))], ids, groups.order, groups.starts, -1)
    assert torch.equal(table, (2 * torch.zeros_like(want).index_add_(0, ids, values.double())).to(dtype))
    check(DEVICE)


def test_a_bad_position_in_a_long_segment_is_left_out_and_told() -> None:
    ids = torch.zeros(3 * CHUNK, dtype=torch.int64, device=DEVICE)
    groups = segments(ids, 4, fused=False)
    order = groups.order.clone()
    order[CHUNK + 5] = 10**9
    sums = segment_sum(torch.ones(len(ids), 3, device=DEVICE), order, groups.starts, groups.stops)
    assert sums[0].tolist() == [3 * CHUNK - 1] * 3
    with pytest.raises(IndexError, match="out of range"):
        check(DEVICE)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        *itertools.product((1, 7, MOST + 5), (torch.float32, torch.bfloat16)),
        *itertools.product((2 * MOST + 13,), DTYPES),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_an_odd_number_of_classes(classes: int, kind: str, dtype: torch.dtype) -> None:
    """Rows in one piece, in one that begins off a multiple of 16 bytes, and apart."""
    weights = torch.tensor([1.0, 0.0, 0.5], dtype=wide(dtype), device=DEVICE)
    for apart, off in ((0, 0), (0, 1), (3, 0)):
        rooms = [randn(3 * (classes + apart) + off + 1, dtype=dtype) for _ in range(2)]
        logits, target = (room[off : off + 3 * (classes + apart)].view(3, -1)[:, :classes] for room in rooms)
        logits[1] = math.nan
        got = divergence(logits, target, weights, kind, True, True)
        want = plain_divergence(logits.double(), target.double(), weights.double(), kind, True, True)
        for one, other, into in zip(got, want, (wide(dtype), dtype, dtype), strict=True):
            close(one, other, TOLERANCE[into])
        assert not got[1][1].any()


def test_moving_is_divided_finely_and_adding_up_is_one_wave() -> None:
    for groups, rows, dim in ((1, 131_072, 1024), (256, 512, 1024), (32, 128, 768), (1, 4_096, 768), (100_000, 2, 64)):
        by = cut(groups, rows, dim)
        assert groups * by.parts <= max(PROGRAMS, groups)
        assert groups * by.movers <= max(MOVERS, groups)
        assert 1 <= by.movers <= by.tiles
        assert by.parts <= 8 or by.tiles >= by.movers * (by.parts // 128)
