"""The kernels of moment_step: rows that are groups in one launch, groups of many rows in one that adds up and one more.

An element's step needs no other element: moments and step are in the perturbation's own precision, as torch's
optimizers have them. What is summed, the squares of a group, is in float64. `sums` [SUMS, groups, parts] holds what
each program that adds up has found; those that move compute the step again, which costs less than to keep it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastadv.kernels.ascend_arithmetic import brought_onto, count_skipped, gradient, shrink
from fastadv.kernels.ascend_by_group import all_parts, place, reach
from fastadv.kernels.common import folded
from fastadv.kernels.gather_perturb import look_up

SUMS = 3  # elements that are not finite, squares after the step, and before it


@triton.jit
def not_finite(g: tl.tensor) -> tl.tensor:
    """1 where a gradient is NaN or infinite."""
    return (tl.abs(g) < float("inf")).to(tl.int64) ^ 1


@triton.jit
def stepped(
    delta: tl.tensor,
    g: tl.tensor,
    m: tl.tensor,
    v: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    keep: tl.tensor,
    rate: tl.tensor,
    root: tl.tensor,
    guard: tl.tensor,
    WIDE: tl.constexpr,
    BOTH: tl.constexpr,
) -> tl.tensor:
    """Delta, m and v after a step."""
    m_after = g
    if BOTH:
        m_after = tl.full([], first, WIDE) * m + tl.full([], 1 - first, WIDE) * g
    v_after = tl.full([], second, WIDE) * v + tl.full([], 1 - second, WIDE) * g * g
    by = m_after / (tl.sqrt(v_after) / tl.full([], root, WIDE) + tl.full([], guard, WIDE))
    return tl.full([], keep, WIDE) * delta + tl.full([], rate, WIDE) * by, m_after, v_after


@triton.jit
def moment_rows_kernel(
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    skipped: tl.tensor,
    weight: tl.tensor,
    ids: tl.tensor,
    embedded: tl.tensor,
    flag: tl.tensor,
    moments: tl.tensor,
    squares: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    grad_stride: tl.tensor,
    weight_stride: tl.tensor,
    vocabulary: tl.tensor,
    first: tl.float64,
    second: tl.float64,
    keep: tl.float64,
    rate: tl.float64,
    root: tl.float64,
    guard: tl.float64,
    epsilon: tl.float64,
    BALL: tl.constexpr,
    MASKED: tl.constexpr,
    BOTH: tl.constexpr,
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
    at = n[:, None] * dim + d[None, :]
    g = gradient(grad, mask, n, d, there, inside, grad_stride, MASKED).to(WIDE)
    before = tl.load(delta + at, mask=inside, other=0)
    v = tl.load(squares + at, mask=inside, other=0)
    m = g
    if BOTH:
        m = tl.load(moments + at, mask=inside, other=0)
    if EMBEDS:
        word = look_up(weight, ids, flag, n, d, there, inside, vocabulary, weight_stride)
    bad = tl.sum(not_finite(g), axis=1)
    count_skipped(skipped, tl.sum((bad > 0).to(tl.int64), axis=0))
    good = (bad == 0)[:, None]
    moved, m_after, v_after = stepped(before, g, m, v, first, second, keep, rate, root, guard, WIDE, BOTH)
    moved = tl.where(good, moved, before).to(tl.float64)
    by = shrink(tl.sqrt(tl.sum(moved * moved, axis=1)), epsilon, BALL)
    after = brought_onto(moved, by[:, None], epsilon, BALL).to(WIDE)
    tl.store(delta + at, after, mask=inside)
    tl.store(squares + at, v_after, mask=inside & good)
    if BOTH:
        tl.store(moments + at, m_after, mask=inside & good)
    if EMBEDS:
        tl.store(embedded + at, (word.to(WIDE) + after).to(word.dtype), mask=inside)


@triton.jit
def moment_sums_kernel(
    sums: tl.tensor,
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    moments: tl.tensor,
    squares: tl.tensor,
    starts: tl.tensor,
    rows: tl.tensor,
    dim: tl.tensor,
    grad_stride: tl.tensor,
    parts: tl.tensor,
    tiles: tl.tensor,
    across: tl.tensor,
    everything: tl.tensor,
    first: tl.float64,
    second: tl.float64,
    keep: tl.float64,
    rate: tl.float64,
    root: tl.float64,
    guard: tl.float64,
    BALL: tl.constexpr,
    MASKED: tl.constexpr,
    BOTH: tl.constexpr,
    WIDE: tl.constexpr,
    RUNS: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """What one part of a group, every `parts`-th tile, has that is not finite, and its squares; nothing moves."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    bad = folded(tl.zeros([ROWS, COLUMNS], tl.float64))
    moved_squares = folded(tl.zeros([ROWS, COLUMNS], tl.float64))
    squares_before = folded(tl.zeros([ROWS, COLUMNS], tl.float64))
    start, own, tiles = reach(starts, group, rows, tiles, across, RUNS, ROWS)
    for tile in tl.range(part, tiles, parts, num_stages=STAGES):
        n, d, there, inside = place(tile, start, own, dim, across, ROWS, COLUMNS)
        at = n[:, None] * dim + d[None, :]
        g = gradient(grad, mask, n, d, there, inside, grad_stride, MASKED).to(WIDE)
        bad += folded(not_finite(g).to(tl.float64))
        if BALL == "l2":
            before = tl.load(delta + at, mask=inside, other=0)
            v = tl.load(squares + at, mask=inside, other=0)
            m = g
            if BOTH:
                m = tl.load(moments + at, mask=inside, other=0)
            moved, _, _ = stepped(before, g, m, v, first, second, keep, rate, root, guard, WIDE, BOTH)
            wide, wide_before = moved.to(tl.float64), before.to(tl.float64)
            moved_squares += folded(wide * wide)
            squares_before += folded(wide_before * wide_before)
    to = sums + group * parts + part
    tl.store(to, tl.sum(bad, axis=0))
    if BALL == "l2":
        tl.store(to + everything, tl.sum(moved_squares, axis=0))
        tl.store(to + 2 * everything, tl.sum(squares_before, axis=0))


@triton.jit
def moment_move_kernel(
    sums: tl.tensor,
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
    skipped: tl.tensor,
    weight: tl.tensor,
    ids: tl.tensor,
    embedded: tl.tensor,
    flag: tl.tensor,
    moments: tl.tensor,
    squares: tl.tensor,
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
    first: tl.float64,
    second: tl.float64,
    keep: tl.float64,
    rate: tl.float64,
    root: tl.float64,
    guard: tl.float64,
    epsilon: tl.float64,
    BALL: tl.constexpr,
    MASKED: tl.constexpr,
    BOTH: tl.constexpr,
    EMBEDS: tl.constexpr,
    WIDE: tl.constexpr,
    RUNS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Move some of a group's tiles, and look their words up."""
    group, mover = tl.program_id(0).to(tl.int64), tl.program_id(1)
    good = tl.sum(all_parts(sums, 0, group, parts, everything, PARTS), axis=0) == 0
    by = epsilon
    if BALL == "l2":
        after_step = tl.sum(all_parts(sums, 1, group, parts, everything, PARTS), axis=0)
        before_step = tl.sum(all_parts(sums, 2, group, parts, everything, PARTS), axis=0)
        by = shrink(tl.sqrt(tl.where(good, after_step, before_step)), epsilon, BALL)
    if mover == 0:
        count_skipped(skipped, good.to(tl.int64) ^ 1)
    start, own, tiles = reach(starts, group, rows, tiles, across, RUNS, ROWS)
    for tile in tl.range(mover, tiles, tl.num_programs(1), num_stages=STAGES):
        n, d, there, inside = place(tile, start, own, dim, across, ROWS, COLUMNS)
        at = n[:, None] * dim + d[None, :]
        g = gradient(grad, mask, n, d, there, inside, grad_stride, MASKED).to(WIDE)
        before = tl.load(delta + at, mask=inside, other=0)
        v = tl.load(squares + at, mask=inside, other=0)
        m = g
        if BOTH:
            m = tl.load(moments + at, mask=inside, other=0)
        if EMBEDS:
            word = look_up(weight, ids, flag, n, d, there, inside, vocabulary, weight_stride)
        moved, m_after, v_after = stepped(before, g, m, v, first, second, keep, rate, root, guard, WIDE, BOTH)
        moved = tl.where(good, moved, before).to(tl.float64)
        after = brought_onto(moved, by, epsilon, BALL).to(WIDE)
        tl.store(delta + at, after, mask=inside)
        tl.store(squares + at, tl.where(good, v_after, v), mask=inside)
        if BOTH:
            tl.store(moments + at, tl.where(good, m_after, m), mask=inside)
        if EMBEDS:
            tl.store(embedded + at, (word.to(WIDE) + after).to(word.dtype), mask=inside)
