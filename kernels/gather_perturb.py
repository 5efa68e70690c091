"""gather_perturb on a GPU: out[n] = round(W[ids[n]] + delta[n]), and its backward to the rows that a batch touches.

A program takes a tile of the output. An index out of range is masked: its row becomes zeros, and the flag is set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.arguments import signatures
from fastadv.arguments.tensors import compute_dtype
from fastadv.kernels.common import columns, complain, launch, over, pointer, wide
from fastadv.kernels.segment_sum import add_up_pieces, constants, sum_segment
from fastadv.native.flags import flag_on
from fastadv.native.launch import fitted

TILE, TALLEST = 2048, 32  # elements that a program writes, and rows at most: every row has addresses of its own


@triton.jit
def look_up(
    weight: tl.tensor,
    ids: tl.tensor,
    flag: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    there: tl.tensor,
    inside: tl.tensor,
    vocabulary: tl.tensor,
    stride: tl.tensor,
) -> tl.tensor:
    """Columns `d` of the words at positions `n`; `there` are the positions, `inside` the elements that exist."""
    word = tl.load(ids + n, mask=there, other=0).to(tl.int64)
    known = (word >= 0) & (word < vocabulary)
    complain(flag, there & (known == 0))
    return tl.load(weight + word[:, None] * stride + d[None, :], mask=inside & known[:, None], other=0)


@triton.jit
def gather_perturb_kernel(
    weight: tl.tensor,
    ids: tl.tensor,
    delta: tl.tensor,
    slot: tl.tensor,
    out: tl.tensor,
    flag: tl.tensor,
    count: tl.tensor,
    vocabulary: tl.tensor,
    stride: tl.tensor,
    slots: tl.tensor,
    dim: tl.tensor,
    ADDS: tl.constexpr,
    BY_SLOT: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """A tile of the output. What has no perturbation is copied bit for bit, -0.0 too."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = n < count
    inside = there[:, None] & (d < dim)[None, :]
    result = look_up(weight, ids, flag, n, d, there, inside, vocabulary, stride)
    if ADDS:
        row = n
        moves = inside
        if BY_SLOT:
            row = tl.load(slot + n, mask=there, other=-1)
            complain(flag, (row < -1) | (row >= slots))
            moves = inside & ((row >= 0) & (row < slots))[:, None]
        added = tl.load(delta + row[:, None] * dim + d[None, :], mask=moves, other=0)
        result = tl.where(moves, (result.to(WIDE) + added).to(result.dtype), result)
    tl.store(out + n[:, None] * dim + d[None, :], result, mask=inside)


@triton.jit
def gather_perturb_backward_kernel(
    table_grad: tl.tensor,
    pieces: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    ids: tl.tensor,
    order: tl.tensor,
    starts: tl.tensor,
    flag: tl.tensor,
    count: tl.tensor,
    vocabulary: tl.tensor,
    stride: tl.tensor,
    first_stride: tl.tensor,
    second_stride: tl.tensor,
    padding: tl.tensor,
    dim: tl.tensor,
    TWO: tl.constexpr,
    WIDE: tl.constexpr,
    CHUNK: tl.constexpr,
    FEW: tl.constexpr,
    STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of one word's gradient: what is there, and all that its positions have."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start, stop = tl.load(starts + s), tl.load(starts + s + 1)
    good = (start >= 0) & (start <= stop) & (stop <= count)
    complain(flag, good == 0)
    if good & (start < stop):
        position = tl.load(order + start)
        word = tl.load(ids + position, mask=(position >= 0) & (position < count), other=-1).to(tl.int64)
        known = (word >= 0) & (word < vocabulary)
        complain(flag, known == 0)
        total = sum_segment(
            pieces, first, second, first_stride, second_stride, order, start, stop, flag, count, d, dim,
            TWO, WIDE, CHUNK, FEW, STAGES, COLUMNS,
        )  # fmt: skip
        at = table_grad + word * stride + d
        written = (d < dim) & known & (word != padding)
        before = tl.load(at, mask=written, other=0)
        tl.store(at, (before.to(WIDE) + total).to(before.dtype), mask=written)


def gather_perturb(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    """`fastadv.ops.gather_perturb`; `fastadv.arguments.signatures` lists the tensors."""
    weight, ids, delta, slot = (*fitted(*signatures.gather(weight, ids, delta, slot)), None, None)[:4]
    out = weight.new_empty((*ids.shape, weight.shape[1]))
    write(weight, ids, delta, slot, out)
    return out


def write(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None, out: Tensor) -> None:
    """The same into `out`; everything was checked."""
    count, dim = ids.numel(), weight.shape[1]
    if count == 0 or dim == 0:
        return
    width = columns(dim, most=1024)
    height = min(max(TILE // width, 1), TALLEST)
    launch(
        gather_perturb_kernel,
        (over(count, height), over(dim, width)),
        weight.device,
        weight,
        ids,
        pointer(delta, weight),
        pointer(slot, ids),
        out,
        flag_on(weight.device),
        count,
        weight.shape[0],
        weight.stride(0),
        0 if delta is None or slot is None else delta.shape[0],
        dim,
        ADDS=delta is not None,
        BY_SLOT=slot is not None,
        WIDE=wide(weight.dtype),
        ROWS=height,
        COLUMNS=width,
    )


def gather_perturb_backward(
    table_grad: Tensor, grads: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor, padding_idx: int
) -> None:
    """`fastadv.ops.gather_perturb_backward`; `fastadv.arguments.signatures` lists the tensors."""
    tensors = (table_grad, ids, order, starts, *grads)
    table_grad, ids, order, starts, *grads = fitted(signatures.GATHER_BACKWARD, tensors)
    rows, dim = starts.shape[0] - 1, table_grad.shape[1]
    if not grads or rows < 1 or dim == 0:
        return
    first, second = grads[0], _rest(grads, table_grad.dtype)
    pieces = add_up_pieces(first, second, order, starts, None, compute_dtype(table_grad.dtype))
    fixed = constants(dim, table_grad.dtype)
    launch(
        gather_perturb_backward_kernel,
        (rows, over(dim, fixed["COLUMNS"])),
        table_grad.device,
        table_grad,
        pointer(pieces, first),
        first,
        pointer(second, first),
        ids,
        order,
        starts,
        flag_on(table_grad.device),
        ids.shape[0],
        table_grad.shape[0],
        table_grad.stride(0),
        first.stride(0),
        0 if second is None else second.stride(0),
        padding_idx,
        dim,
        TWO=second is not None,
        WIDE=wide(table_grad.dtype),
        **fixed,
    )
    torch.autograd.graph.increment_version(table_grad)


def _rest(grads: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
    """All but the first, as one: an engine's step has two at most."""
    if len(grads) < 3:
        return grads[1] if len(grads) == 2 else None
    total = grads[1].to(torch.promote_types(dtype, torch.float32), copy=True)
    for grad in grads[2:]:
        total += grad
    return total
