"""segment_sum on a GPU: out[s] = the sum of values[order[i]] over i in starts[s] .. stops[s].

Most words of a batch occur once or twice, and a few of them thousands of times. `segments_kernel` gives each segment
one warp, which adds its rows up, a few at a time. What is longer than a chunk comes in two passes: a program of
`pieces_kernel` for each chunk of positions has added up before what the segment that reaches into the chunk has there;
the segment's own program adds the rows before its first such chunk and then those pieces, in their order. So no program
reads more than a chunk of rows, and the result repeats bit for bit. Segments come in the order of their positions, as
`segments` makes them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.arguments import signatures
from fastadv.arguments.tensors import compute_dtype
from fastadv.kernels.common import columns, complain, launch, over, pointer, wide
from fastadv.native.flags import flag_on
from fastadv.native.launch import fitted

CHUNK = 128  # positions; of a longer segment other programs add up most
FEW, STAGES = 4, 3  # rows that a segment's program reads at a time, and how many times ahead
WAYS = 256  # into which the search for a position's segment divides what is left
BLOCK = 64  # columns of a piece's program, which reads all rows of a chunk at once


@triton.jit
def rows_at(
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
    ROWS: tl.constexpr,
) -> tl.tensor:
    """The sum of columns `d` of at most `ROWS` rows from `start` on."""
    i = start + tl.arange(0, ROWS)
    n = tl.load(order + i, mask=i < stop, other=0)
    known = (n >= 0) & (n < count)
    complain(flag, (i < stop) & (known == 0))
    there = ((i < stop) & known)[:, None] & (d < dim)[None, :]
    return tl.sum(tl.load(values + n[:, None] * stride + d[None, :], mask=there, other=0).to(WIDE), axis=0)


@triton.jit
def segment_at(starts: tl.tensor, segments: tl.tensor, position: tl.tensor, WAYS: tl.constexpr) -> tl.tensor:
    """The last segment that starts at `position` or before: `starts` rise."""
    low = position * 0
    left = low + segments
    while left > 1:
        apart = tl.cdiv(left, WAYS)
        ahead = apart * tl.arange(0, WAYS)
        start = tl.load(starts + low + ahead, mask=ahead < left, other=0)
        found = tl.maximum(tl.sum(((ahead < left) & (start <= position)).to(tl.int64), axis=0) - 1, 0)
        low += found * apart
        left = tl.minimum(apart, left - found * apart)
    return low


@triton.jit
def pieces_kernel(
    pieces: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    stops: tl.tensor,
    flag: tl.tensor,
    count: tl.tensor,
    segments: tl.tensor,
    first_stride: tl.tensor,
    second_stride: tl.tensor,
    dim: tl.tensor,
    TWO: tl.constexpr,
    NEXT: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    WAYS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """What a long segment has in one chunk that it begins before, or with. Other chunks have no piece."""
    c = tl.program_id(0).to(tl.int64)
    here = c * CHUNK
    s = segment_at(starts, segments, here, WAYS)
    start, stop = tl.load(starts + s), tl.load(stops + s + NEXT)
    if (start >= 0) & (start <= here) & (here < stop) & (stop <= count) & (stop - start > CHUNK):
        d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = rows_at(first, first_stride, order, here, stop, flag, count, d, dim, WIDE, CHUNK)
        if TWO:
            total += rows_at(second, second_stride, order, here, stop, flag, count, d, dim, WIDE, CHUNK)
        tl.store(pieces + c * dim + d, total, mask=d < dim)


@triton.jit
def sum_segment(
    pieces: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    first_stride: tl.tensor,
    second_stride: tl.tensor,
    order: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    flag: tl.tensor,
    count: tl.tensor,
    d: tl.tensor,
    dim: tl.tensor,
    TWO: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Columns `d` of the sum of both values[order[i]], i from `start` to `stop`."""
    total = tl.zeros([COLUMNS], WIDE)
    piece = tl.cdiv(start, CHUNK)
    end = stop
    if stop - start > CHUNK:
        end = piece * CHUNK
    if end - start <= FEW:
        total += rows_at(first, first_stride, order, start, end, flag, count, d, dim, WIDE, FEW)
        if TWO:
            total += rows_at(second, second_stride, order, start, end, flag, count, d, dim, WIDE, FEW)
    else:
        for i in tl.range(start, end, FEW, num_stages=STAGES):
            total += rows_at(first, first_stride, order, i, end, flag, count, d, dim, WIDE, FEW)
            if TWO:
                total += rows_at(second, second_stride, order, i, end, flag, count, d, dim, WIDE, FEW)
    if stop - start > CHUNK:
        last = tl.cdiv(stop, CHUNK)
        for c in tl.range(piece, last, FEW, num_stages=STAGES):
            n = c + tl.arange(0, FEW)
            there = (n < last)[:, None] & (d < dim)[None, :]
            total += tl.sum(tl.load(pieces + n[:, None] * dim + d[None, :], mask=there, other=0), axis=0)
    return total


@triton.jit
def segments_kernel(
    pieces: tl.tensor,
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
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of one segment; an empty one is zeros, and so is one that points outside."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop = tl.load(starts + s), tl.load(stops + s)
    good = (start >= 0) & (start <= stop) & (stop <= count)
    complain(flag, good == 0)
    stop = tl.where(good, stop, start)
    total = sum_segment(
        pieces, values, values, stride, stride, order, start, stop, flag, count, d, dim,
        False, WIDE, CHUNK, FEW, STAGES, COLUMNS,
    )  # fmt: skip
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
    pieces = add_up_pieces(values, None, order, starts, stops, out.dtype)
    fixed = constants(dim, out.dtype)
    launch(
        segments_kernel,
        (rows, over(dim, fixed["COLUMNS"])),
        values.device,
        pointer(pieces, out),
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
        **fixed,
    )


def add_up_pieces(
    first: Tensor, second: Tensor | None, order: Tensor, starts: Tensor, stops: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The pieces of long segments, [chunks, D] in `dtype`; None where no segment can be longer than a chunk.

    `stops` is None where each segment ends where the next one starts.
    """
    count, dim = first.shape
    if count <= CHUNK:
        return None
    pieces = first.new_empty((over(count, CHUNK), dim), dtype=dtype)
    launch(
        pieces_kernel,
        (pieces.shape[0], over(dim, BLOCK)),
        first.device,
        pieces,
        first,
        pointer(second, first),
        order,
        starts,
        pointer(stops, starts),
        flag_on(first.device),
        count,
        starts.shape[0] - 1 if stops is None else stops.shape[0],
        first.stride(0),
        0 if second is None else second.stride(0),
        dim,
        TWO=second is not None,
        NEXT=int(stops is None),
        WIDE=wide(dtype),
        CHUNK=CHUNK,
        WAYS=WAYS,
        COLUMNS=BLOCK,
    )
    return pieces


def constants(dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of a launch that gives some columns of each segment a warp, to add up in `dtype`."""
    width = columns(dim, most=128 if dtype == torch.float64 else 256)
    return {"CHUNK": CHUNK, "FEW": FEW, "STAGES": STAGES, "COLUMNS": width, "num_warps": 1}
