"""ascend where a group is many rows: one launch adds up, one moves; the unit ball measures in between.

The programs of a group take its tiles in turns. `sums` [SUMS, groups, parts] holds what each of those that add has.
Those that move are more, and finer: they sum nothing.
"""

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
from fastadv.kernels.common import folded
from fastadv.kernels.gather_perturb import look_up

SUMS = 5  # uu, du, dd, the largest |u|, and the unit ball's measure of what has moved


@triton.jit
def reach(
    starts: tl.tensor,
    group: tl.tensor,
    rows: tl.tensor,
    tiles: tl.tensor,
    across: tl.tensor,
    RUNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """A group's first row, how many it has, and its tiles. Of runs, `rows` are all there are."""
    if RUNS:
        first = tl.minimum(tl.maximum(tl.load(starts + group), 0), rows)
        own = tl.maximum(tl.minimum(tl.load(starts + group + 1), rows) - first, 0)
        tiles = (own + ROWS - 1) // ROWS * across
    else:
        first, own = group * rows, rows
    return first, own, tiles


@triton.jit
def place(
    tile: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    across: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """The rows and columns of a group's tile, and which of them exist; `across` tiles lie side by side."""
    row = (tile // across) * ROWS + tl.arange(0, ROWS)
    d = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    there = row < rows
    return first + row, d, there, there[:, None] & (d < dim)[None, :]


@triton.jit
def largest_of(x: tl.tensor) -> tl.tensor:
    """The largest magnitudes of the neighbours that `folded` adds up."""
    FOLD: tl.constexpr = min(8, x.numel)
    return tl.max(tl.reshape(tl.abs(x), [x.numel // FOLD, FOLD]), axis=1)


@triton.jit
def sums_kernel(
    sums: tl.tensor,
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    grad_stride: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    across: tl.tensor,
    everything: tl.tensor,
    DIRECTION: tl.constexpr,
    BALL: tl.constexpr,
    MASKED: tl.constexpr,
    RUNS: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The sums of one part of a group: of every `parts`-th tile."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    uu = folded(tl.zeros([ROWS, COLUMNS], tl.float64))
    du = folded(tl.zeros([ROWS, COLUMNS], tl.float64))
    dd = folded(tl.zeros([ROWS, COLUMNS], tl.float64))
    largest = folded(tl.zeros([ROWS, COLUMNS], tl.float64))
    first, own, tiles = reach(starts, group, rows, tiles, across, RUNS, ROWS)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        n, d, there, inside = place(tile, first, own, dim, across, ROWS, COLUMNS)
        u = direction_of(gradient(grad, mask, n, d, there, inside, grad_stride, MASKED), DIRECTION)
        uu += folded(u * u)
        if DIRECTION == "max":
            largest = tl.maximum(largest, largest_of(u))
        if BALL == "l2":
            before = tl.load(delta + n[:, None] * dim + d[None, :], mask=inside, other=0).to(tl.float64)
            du += folded(before * u)
            dd += folded(before * before)
    at = sums + group * parts + part
    tl.store(at, tl.sum(uu, axis=0))
    if BALL == "l2":
        tl.store(at + everything, tl.sum(du, axis=0))
        tl.store(at + 2 * everything, tl.sum(dd, axis=0))
    if DIRECTION == "max":
        tl.store(at + 3 * everything, tl.max(largest, axis=0))


@triton.jit
def all_parts(
    sums: tl.tensor, which: tl.tensor, group: tl.tensor, parts: tl.tensor, everything: tl.tensor, PARTS: tl.constexpr
) -> tl.tensor:
    """The partial sums of a group, padded with 0, which changes neither a sum nor a maximum."""
    part = tl.arange(0, PARTS)
    return tl.load(sums + which * everything + group * parts + part, mask=part < parts, other=0)


@triton.jit
def step_of(
    sums: tl.tensor,
    group: tl.tensor,
    parts: tl.tensor,
    everything: tl.tensor,
    step: tl.tensor,
    DIRECTION: tl.constexpr,
    PARTS: tl.constexpr,
) -> tl.tensor:
    """Uu and a of a group."""
    uu = tl.sum(all_parts(sums, 0, group, parts, everything, PARTS), axis=0)
    largest = uu
    if DIRECTION == "max":
        largest = tl.max(all_parts(sums, 3, group, parts, everything, PARTS), axis=0)
    return uu, factor(uu, largest, step, DIRECTION)


@triton.jit
def unit_kernel(
    sums: tl.tensor,
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    grad_stride: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    across: tl.tensor,
    everything: tl.tensor,
    step: tl.float64,
    DIRECTION: tl.constexpr,
    MASKED: tl.constexpr,
    RUNS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The size of what a part of a group becomes by the step: a sum of squares, or the largest element."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, a = step_of(sums, group, parts, everything, step, DIRECTION, PARTS)
    size = folded(tl.zeros([ROWS, COLUMNS], tl.float64))
    first, own, tiles = reach(starts, group, rows, tiles, across, RUNS, ROWS)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        n, d, there, inside = place(tile, first, own, dim, across, ROWS, COLUMNS)
        u = direction_of(gradient(grad, mask, n, d, there, inside, grad_stride, MASKED), DIRECTION)
        before = tl.load(delta + n[:, None] * dim + d[None, :], mask=inside, other=0).to(tl.float64)
        moved = moved_by(before, u, a)
        if DIRECTION == "l2":
            size += folded(moved * moved)
        else:
            size = tl.maximum(size, largest_of(moved))
    at = sums + 4 * everything + group * parts + part
    if DIRECTION == "l2":
        tl.store(at, tl.sum(size, axis=0))
    else:
        tl.store(at, tl.max(size, axis=0))


@triton.jit
def size_after(
    sums: tl.tensor,
    group: tl.tensor,
    parts: tl.tensor,
    everything: tl.tensor,
    uu: tl.tensor,
    a: tl.tensor,
    DIRECTION: tl.constexpr,
    BALL: tl.constexpr,
    PARTS: tl.constexpr,
) -> tl.tensor:
    """The size of a moved group, as the ball measures it."""
    if BALL == "l2":
        dd = tl.sum(all_parts(sums, 2, group, parts, everything, PARTS), axis=0)
        du = tl.sum(all_parts(sums, 1, group, parts, everything, PARTS), axis=0)
        squares = tl.where(a != 0, dd + 2 * a * du + a * a * uu, dd)
        return tl.sqrt(tl.where(squares > 0, squares, 0))
    if BALL == "unit":
        if DIRECTION == "l2":
            return tl.sqrt(tl.sum(all_parts(sums, 4, group, parts, everything, PARTS), axis=0))
        return tl.max(all_parts(sums, 4, group, parts, everything, PARTS), axis=0)
    return uu


@triton.jit
def move_kernel(
    sums: tl.tensor,
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    skipped: tl.tensor,
    weight: tl.tensor,
    ids: tl.tensor,
    embedded: tl.tensor,
    flag: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    grad_stride: tl.tensor,
    weight_stride: tl.tensor,
    vocabulary: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    across: tl.tensor,
    everything: tl.tensor,
    step: tl.float64,
    epsilon: tl.float64,
    DIRECTION: tl.constexpr,
    BALL: tl.constexpr,
    MASKED: tl.constexpr,
    RUNS: tl.constexpr,
    EMBEDS: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Move some of a group's tiles, and look their words up."""
    group, mover = tl.program_id(0).to(tl.int64), tl.program_id(1)
    uu, a = step_of(sums, group, parts, everything, step, DIRECTION, PARTS)
    by = shrink(size_after(sums, group, parts, everything, uu, a, DIRECTION, BALL, PARTS), epsilon, BALL)
    if mover == 0:
        count_skipped(skipped, (uu < float("inf")).to(tl.int64) ^ 1)
    first, own, tiles = reach(starts, group, rows, tiles, across, RUNS, ROWS)
    for tile in tl.range(mover, tiles, tl.num_programs(1), num_stages=STAGES):
        n, d, there, inside = place(tile, first, own, dim, across, ROWS, COLUMNS)
        at = delta + n[:, None] * dim + d[None, :]
        u = direction_of(gradient(grad, mask, n, d, there, inside, grad_stride, MASKED), DIRECTION)
        before = tl.load(at, mask=inside, other=0).to(tl.float64)
        if EMBEDS:
            word = look_up(weight, ids, flag, n, d, there, inside, vocabulary, weight_stride)
        after = brought_onto(moved_by(before, u, a), by, epsilon, BALL).to(delta.dtype.element_ty)
        tl.store(at, after, mask=inside)
        if EMBEDS:
            tl.store(embedded + n[:, None] * dim + d[None, :], (word.to(WIDE) + after).to(word.dtype), mask=inside)
