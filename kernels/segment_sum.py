"""segment_sum on a GPU: out[s] = the sum of values[order[i]] over i in starts[s] .. stops[s].

A program takes some columns of one segment. Most words of a batch occur once or twice, and a few of them hundreds of
times: a short segment is one small tile, a long one is read in tiles of `MANY` rows. Each tile is added up in an order
of its own, and tiles one after the other: the result repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.arguments import signatures
from fastadv.arguments.tensors import compute_dtype
from fastadv.kernels.common import columns, complain, launch, wide
from fastadv.native.flags import flag_on
from fastadv.native.launch import fitted

FEW, MANY = 4, 32  # rows of a tile


def heights(dtype: torch.dtype) -> dict[str, int]:
    """The tiles' rows; half as many of float64, which would not fit in registers."""
    return {"FEW": FEW, "MANY": MANY // 2 if dtype == torch.float64 else MANY}


@triton.jit
def add_rows(
    total: tl.tensor,
    values: tl.tensor,
    stride: tl.tensor,
    order: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    flag: tl.tensor,
    count: tl.tensor,
    d: tl.tensor,
    dim: tl.tensor,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """`total`, and columns `d` of at most `ROWS` rows from `start` on."""
    i = start + tl.arange(0, ROWS)
    n = tl.load(order + i, mask=i < stop, other=0)
    known = (n >= 0) & (n < count)
    complain(flag, (i < stop) & (known == 0))
    tile = tl.load(
        values + n[:, None] * stride + d[None, :], mask=((i < stop) & known)[:, None] & (d < dim)[None, :], other=0
    )
    return total + tl.sum(tile.to(total.dtype), axis=0)


@triton.jit
def sum_segment(
    values: tl.tensor,
    stride: tl.tensor,
    order: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    flag: tl.tensor,
    count: tl.tensor,
    d: tl.tensor,
    dim: tl.tensor,
    WIDE: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Columns `d` of the sum of values[order[i]], i from `start` to `stop`."""
    total = tl.zeros([COLUMNS], WIDE)
    if stop - start <= FEW:
        total = add_rows(total, values, stride, order, start, stop, flag, count, d, dim, FEW)
    else:
        for first in range(start, stop, MANY):
            total = add_rows(total, values, stride, order, first, stop, flag, count, d, dim, MANY)
    return total


@triton.jit
def segment_sum_kernel(
    values: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    stops: tl.tensor,
    out: tl.tensor,
    flag: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    dim: tl.tensor,
    WIDE: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of one segment; an empty one is zeros, and so is one that points outside."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop = tl.load(starts + s), tl.load(stops + s)
    good = (start >= 0) & (start <= stop) & (stop <= count)
    complain(flag, good == 0)
    stop = tl.where(good, stop, start)
    total = sum_segment(values, stride, order, start, stop, flag, count, d, dim, WIDE, FEW, MANY, COLUMNS)
    tl.store(out + s * dim + d, total, mask=d < dim)


def segment_sum(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """`fastadv.ops.segment_sum`; `fastadv.arguments.signatures` lists the tensors."""
    values, order, stops, starts = fitted(signatures.SEGMENT_SUM, (values, order, stops, starts))
    out = values.new_empty((stops.shape[0], values.shape[1]), dtype=compute_dtype(values.dtype))
    write(values, order, starts, stops, out)
    return out


def write(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor, out: Tensor) -> None:
    """The same into `out`; everything was checked."""
    rows, dim = out.shape
    if rows == 0 or dim == 0:
        return
    width = columns(dim, most=256)
    launch(
        segment_sum_kernel,
        (rows, triton.cdiv(dim, width)),
        values.device,
        values,
        order,
        starts,
        stops,
        out,
        flag_on(values.device),
        values.shape[0],
        values.stride(0),
        dim,
        WIDE=wide(values.dtype),
        **heights(values.dtype),
        COLUMNS=width,
    )
