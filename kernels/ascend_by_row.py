"""ascend where each row is a group: it stays in registers from its gradient to its words' embedding. One launch."""

from __future__ import annotations

import triton
import triton.language as tl

from fastadv.kernels.ascend_arithmetic import (
    brought_onto,
    count_skipped,
    direction_of,
    factor,
    gradient,
    moved_by,
    shrink,
)
from fastadv.kernels.gather_perturb import look_up


@triton.jit
def rows_kernel(
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    skipped: tl.tensor,
    weight: tl.tensor,
    ids: tl.tensor,
    embedded: tl.tensor,
    flag: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    grad_stride: tl.tensor,
    weight_stride: tl.tensor,
    vocabulary: tl.tensor,
    step: tl.float64,
    epsilon: tl.float64,
    DIRECTION: tl.constexpr,
    BALL: tl.constexpr,
    MASKED: tl.constexpr,
    EMBEDS: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some whole rows, from their gradient to their words' embedding."""
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, COLUMNS)
    there = n < rows
    inside = there[:, None] & (d < dim)[None, :]
    at = delta + n[:, None] * dim + d[None, :]
    u = direction_of(gradient(grad, mask, n, d, there, inside, grad_stride, MASKED), DIRECTION)
    before = tl.load(at, mask=inside, other=0).to(tl.float64)
    if EMBEDS:
        word = look_up(weight, ids, flag, n, d, there, inside, vocabulary, weight_stride)
    uu = tl.sum(u * u, axis=1)
    largest = uu
    if DIRECTION == "max":
        largest = tl.max(tl.abs(u), axis=1)
    a = factor(uu, largest, step, DIRECTION)
    count_skipped(skipped, tl.sum((uu < float("inf")).to(tl.int64) ^ 1, axis=0))
    moved = moved_by(before, u, a[:, None])
    by = shrink(size_of(moved, DIRECTION, BALL), epsilon, BALL)
    after = brought_onto(moved, by[:, None], epsilon, BALL).to(delta.dtype.element_ty)
    tl.store(at, after, mask=inside)
    if EMBEDS:
        tl.store(embedded + n[:, None] * dim + d[None, :], (word.to(WIDE) + after).to(word.dtype), mask=inside)


@triton.jit
def size_of(moved: tl.tensor, DIRECTION: tl.constexpr, BALL: tl.constexpr) -> tl.tensor:
    """Each row's size: the l2 norm, or for a unit ball after sign and max the largest magnitude."""
    if (BALL == "unit") & (DIRECTION != "l2"):
        return tl.max(tl.abs(moved), axis=1)
    return tl.sqrt(tl.sum(moved * moved, axis=1))
