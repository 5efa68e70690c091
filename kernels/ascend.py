r"""ascend on a GPU: delta <- ball(delta + step * d(g)), and the next forward's W[ids] + delta in the same pass.

With u = g (sign(g) for the sign), a = step / |u| and the sums uu, du and dd of the squares and products of u and
delta, the moved perturbation has the norm

.. math:: |\delta + a u|^2 = dd + 2 a \, du + a^2 uu

so that one pass that adds up and one that moves are enough. Where a group is a row, the row stays in registers and both
are one launch. Otherwise `sums_kernel` leaves the sums of its tiles, and every program of `move_kernel` adds all of
its group's up again, in an order that is always the same: nothing is atomic, nothing waits for the host, and results
repeat bit for bit. Only the unit ball needs a third launch, which measures what has moved.

Everything is computed in float64 and rounded once. Products of float32 are exact there, so that gradients of 1e30 and
1e-30 need no scaling and the formula above may cancel; what costs is memory. (For float64 tensors squares beyond 1e308
are not finite, and such a group takes no step; the C++ version goes further.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.kernels import gather_perturb as lookups
from fastadv.kernels.common import columns, launch, pointer, wide
from fastadv.kernels.gather_perturb import look_up
from fastadv.native import ascend as checked
from fastadv.native import checks
from fastadv.native.flags import flag_on

OP = "ascend"
LONGEST_ROW = 8192  # elements that a program keeps in registers
TILE, TALLEST = 1024, 8  # elements of a tile, and rows at most: every row has addresses of its own
PROGRAMS = 1024  # of a launch over groups; fixed, so that sums do not depend on the device
SUMS = 5  # uu, du, dd, the largest |u|, and the unit ball's measure of what has moved


# A group's arithmetic, in float64


@triton.jit
def direction_of(g: tl.tensor, DIRECTION: tl.constexpr) -> tl.tensor:
    """u: the direction, before it is brought to length; NaN where g is not finite."""
    if DIRECTION == "sign":
        return (g > 0).to(tl.float64) - (g < 0).to(tl.float64) + (g - g)
    return g


@triton.jit
def factor(uu: tl.tensor, largest: tl.tensor, step: tl.tensor, DIRECTION: tl.constexpr) -> tl.tensor:
    """a: what u is multiplied with; 0 where there is no gradient, or one that is not finite."""
    size = uu * 0 + 1
    if DIRECTION == "l2":
        size = tl.sqrt(uu)
    if DIRECTION == "max":
        size = largest
    good = (uu > 0) & (uu < float("inf"))
    return tl.where(good, step / tl.where(good, size, 1), 0)


@triton.jit
def shrink(size: tl.tensor, epsilon: tl.tensor, BALL: tl.constexpr) -> tl.tensor:
    """What a perturbation of this size is multiplied with to lie on the ball."""
    if BALL == "unit":
        return tl.where(size > 0, epsilon / tl.where(size > 0, size, 1), 1)
    return tl.where(size > epsilon, epsilon / tl.where(size > 0, size, 1), 1)


@triton.jit
def moved_by(delta: tl.tensor, u: tl.tensor, a: tl.tensor) -> tl.tensor:
    """Delta + a u; where there is no step, delta, whatever u is."""
    return tl.where(a != 0, delta + a * u, delta)


@triton.jit
def brought_onto(moved: tl.tensor, by: tl.tensor, epsilon: tl.tensor, BALL: tl.constexpr) -> tl.tensor:
    """What has moved, on the ball."""
    if BALL == "none":
        return moved
    if BALL == "linf":
        return tl.where(moved > epsilon, epsilon, tl.where(moved < -epsilon, -epsilon, moved))
    return moved * by


# One launch: each row is a group


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
        word = look_up(weight, ids, flag, n, d, there, inside, vocabulary, weight_stride)
        tl.store(embedded + n[:, None] * dim + d[None, :], (word.to(WIDE) + after).to(word.dtype), mask=inside)


@triton.jit
def size_of(moved: tl.tensor, DIRECTION: tl.constexpr, BALL: tl.constexpr) -> tl.tensor:
    """What the ball measures of each row: the l2 norm, or, for a unit ball after sign and max, the largest element."""
    if (BALL == "unit") & (DIRECTION != "l2"):
        return tl.max(tl.abs(moved), axis=1)
    return tl.sqrt(tl.sum(moved * moved, axis=1))


@triton.jit
def gradient(
    grad: tl.tensor,
    mask: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    there: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """A tile of the gradient; zero where the mask says that nothing is."""
    live = inside
    if MASKED:
        live = inside & tl.load(mask + n, mask=there, other=0).to(tl.int1)[:, None]
    return tl.load(grad + n[:, None] * stride + d[None, :], mask=live, other=0).to(tl.float64)


@triton.jit
def count_skipped(skipped: tl.tensor, groups: tl.tensor) -> None:
    """Whole numbers add up to the same in any order: this may be atomic."""
    tl.atomic_add(skipped, groups, mask=groups > 0)


# Two launches: a group is many rows


@triton.jit
def place(
    tile: tl.tensor,
    group: tl.tensor,
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
    return group * rows + row, d, there, there[:, None] & (d < dim)[None, :]


@triton.jit
def sums_kernel(
    sums: tl.tensor,
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
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
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The sums of one part of a group: of every `parts`-th tile."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    uu = tl.zeros([ROWS, COLUMNS], tl.float64)
    du = tl.zeros([ROWS, COLUMNS], tl.float64)
    dd = tl.zeros([ROWS, COLUMNS], tl.float64)
    largest = tl.zeros([ROWS, COLUMNS], tl.float64)
    for tile in range(part, tiles, parts):
        n, d, there, inside = place(tile, group, rows, dim, across, ROWS, COLUMNS)
        u = direction_of(gradient(grad, mask, n, d, there, inside, grad_stride, MASKED), DIRECTION)
        uu += u * u
        if DIRECTION == "max":
            largest = tl.maximum(largest, tl.abs(u))
        if BALL == "l2":
            before = tl.load(delta + n[:, None] * dim + d[None, :], mask=inside, other=0).to(tl.float64)
            du += before * u
            dd += before * before
    at = sums + group * parts + part
    tl.store(at, tl.sum(uu))
    if BALL == "l2":
        tl.store(at + everything, tl.sum(du))
        tl.store(at + 2 * everything, tl.sum(dd))
    if DIRECTION == "max":
        tl.store(at + 3 * everything, tl.max(largest))


@triton.jit
def added_up(
    sums: tl.tensor, which: tl.tensor, group: tl.tensor, parts: tl.tensor, everything: tl.tensor, PARTS: tl.constexpr
) -> tl.tensor:
    """A group's sum of the sums of its parts."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums + which * everything + group * parts + part, mask=part < parts, other=0), axis=0)


@triton.jit
def largest_of(
    sums: tl.tensor, which: tl.tensor, group: tl.tensor, parts: tl.tensor, everything: tl.tensor, PARTS: tl.constexpr
) -> tl.tensor:
    """A group's largest of the largest of its parts."""
    part = tl.arange(0, PARTS)
    return tl.max(tl.load(sums + which * everything + group * parts + part, mask=part < parts, other=0), axis=0)


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
    uu = added_up(sums, 0, group, parts, everything, PARTS)
    largest = uu
    if DIRECTION == "max":
        largest = largest_of(sums, 3, group, parts, everything, PARTS)
    return uu, factor(uu, largest, step, DIRECTION)


@triton.jit
def unit_kernel(
    sums: tl.tensor,
    delta: tl.tensor,
    grad: tl.tensor,
    mask: tl.tensor,
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
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The size of what a part of a group becomes by the step: a sum of squares, or the largest element."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    _, a = step_of(sums, group, parts, everything, step, DIRECTION, PARTS)
    size = tl.zeros([ROWS, COLUMNS], tl.float64)
    for tile in range(part, tiles, parts):
        n, d, there, inside = place(tile, group, rows, dim, across, ROWS, COLUMNS)
        u = direction_of(gradient(grad, mask, n, d, there, inside, grad_stride, MASKED), DIRECTION)
        before = tl.load(delta + n[:, None] * dim + d[None, :], mask=inside, other=0).to(tl.float64)
        moved = moved_by(before, u, a)
        if DIRECTION == "l2":
            size += moved * moved
        else:
            size = tl.maximum(size, tl.abs(moved))
    at = sums + 4 * everything + group * parts + part
    if DIRECTION == "l2":
        tl.store(at, tl.sum(size))
    else:
        tl.store(at, tl.max(size))


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
    """What the ball measures of a group that has moved."""
    if BALL == "l2":
        dd = added_up(sums, 2, group, parts, everything, PARTS)
        du = added_up(sums, 1, group, parts, everything, PARTS)
        squares = tl.where(a != 0, dd + 2 * a * du + a * a * uu, dd)
        return tl.sqrt(tl.where(squares > 0, squares, 0))
    if BALL == "unit":
        if DIRECTION == "l2":
            return tl.sqrt(added_up(sums, 4, group, parts, everything, PARTS))
        return largest_of(sums, 4, group, parts, everything, PARTS)
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
    EMBEDS: tl.constexpr,
    WIDE: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Move a part of a group, and look its words up."""
    group, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    uu, a = step_of(sums, group, parts, everything, step, DIRECTION, PARTS)
    by = shrink(size_after(sums, group, parts, everything, uu, a, DIRECTION, BALL, PARTS), epsilon, BALL)
    if part == 0:
        count_skipped(skipped, (uu < float("inf")).to(tl.int64) ^ 1)
    for tile in range(part, tiles, parts):
        n, d, there, inside = place(tile, group, rows, dim, across, ROWS, COLUMNS)
        at = delta + n[:, None] * dim + d[None, :]
        u = direction_of(gradient(grad, mask, n, d, there, inside, grad_stride, MASKED), DIRECTION)
        moved = moved_by(tl.load(at, mask=inside, other=0).to(tl.float64), u, a)
        after = brought_onto(moved, by, epsilon, BALL).to(delta.dtype.element_ty)
        tl.store(at, after, mask=inside)
        if EMBEDS:
            word = look_up(weight, ids, flag, n, d, there, inside, vocabulary, weight_stride)
            tl.store(embedded + n[:, None] * dim + d[None, :], (word.to(WIDE) + after).to(word.dtype), mask=inside)


# The launcher


class Step(NamedTuple):
    """What is moved where, checked; the table and what follows it belong together."""

    delta: Tensor
    grad: Tensor
    grad_stride: int
    mask: Tensor | None
    skipped: Tensor
    rule: checked.Rule
    weight: Tensor | None = None
    ids: Tensor | None = None
    embedded: Tensor | None = None

    def constants(self) -> dict[str, Any]:
        """What all kernels that move are compiled for."""
        _, epsilon, direction, ball, _ = self.rule
        return {
            "DIRECTION": direction,
            "BALL": "none" if epsilon is None else ball,
            "MASKED": self.mask is not None,
        }


def ascend(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    slot: Tensor | None = None,
    embedded: Tensor | None = None,
) -> None:
    """`fastadv.ops.ascend`; tensors as `fastadv.native.ascend` takes them.

    With `slot` the lookup is a launch of its own: many positions take one row.
    """
    checked.check_rule(OP, delta, direction, ball, group)
    checked.check_step(OP, delta, grad, mask, skipped)
    grad, grad_stride = checked.rows_of(OP, grad)
    mask = None if mask is None else mask.contiguous()
    step = Step(delta, grad, grad_stride, mask, skipped, (step_size, epsilon, direction, ball, group))
    if checked.embeds(OP, delta, weight, ids, slot, embedded):
        assert weight is not None and ids is not None and embedded is not None
        ids = checks.indices(OP, "ids", ids)
        if slot is None:
            run(step._replace(weight=weight, ids=ids, embedded=embedded))
        else:
            run(step)
            lookups.write(weight, ids, delta, slot.contiguous(), embedded)
        increment_version((delta, skipped, embedded))
    else:
        run(step)
        increment_version((delta, skipped))


def run(step: Step) -> None:
    """Launch what the groups need."""
    delta, group = step.delta, step.rule[-1]
    groups, rows = math.prod(delta.shape[:group]), math.prod(delta.shape[group:-1])
    if delta.numel() == 0:
        return
    if rows == 1 and delta.shape[-1] <= LONGEST_ROW:
        _by_row(step, groups)
    else:
        _by_group(step, groups, rows)


def _by_row(step: Step, rows: int) -> None:
    dim = step.delta.shape[-1]
    width = triton.next_power_of_2(dim)
    height = min(max(TILE // width, 1), TALLEST)
    launch(
        rows_kernel,
        (triton.cdiv(rows, height),),
        step.delta.device,
        *_moved(step),
        rows,
        dim,
        step.grad_stride,
        *_table(step),
        *_lengths(step),
        **step.constants(),
        EMBEDS=step.weight is not None,
        WIDE=wide(step.delta.dtype),
        ROWS=height,
        COLUMNS=width,
        num_warps=min(max(height * width // 256, 4), 16),
    )


def _by_group(step: Step, groups: int, rows: int) -> None:
    delta, dim = step.delta, step.delta.shape[-1]
    width = columns(dim, most=TILE)
    height = min(max(TILE // width, 1), TALLEST)
    across = triton.cdiv(dim, width)
    tiles = triton.cdiv(rows, height) * across
    parts = min(tiles, max(PROGRAMS // groups, 1))
    grid, everything = (groups, parts), groups * parts
    sums = torch.empty(SUMS * everything, dtype=torch.float64, device=delta.device)
    read = (sums, delta, step.grad, pointer(step.mask, delta), rows, dim, step.grad_stride)
    cut = (parts, tiles, across, everything)
    tile = {"ROWS": height, "COLUMNS": width}
    constants, some = step.constants(), {"PARTS": triton.next_power_of_2(parts)}
    launch(sums_kernel, grid, delta.device, *read, *cut, **constants, **tile)
    if constants["BALL"] == "unit":
        without = {name: constants[name] for name in ("DIRECTION", "MASKED")}
        launch(unit_kernel, grid, delta.device, *read, *cut, step.rule[0], **without, **some, **tile)
    launch(
        move_kernel,
        grid,
        delta.device,
        sums,
        *_moved(step),
        rows,
        dim,
        step.grad_stride,
        *_table(step),
        *cut,
        *_lengths(step),
        **constants,
        EMBEDS=step.weight is not None,
        WIDE=wide(delta.dtype),
        **some,
        **tile,
    )


def _moved(step: Step) -> tuple[Tensor, ...]:
    delta = step.delta
    optional = (pointer(tensor, delta) for tensor in (step.weight, step.ids, step.embedded))
    return (delta, step.grad, pointer(step.mask, delta), step.skipped, *optional, flag_on(delta.device))


def _table(step: Step) -> tuple[int, int]:
    return (0, 0) if step.weight is None else (step.weight.stride(0), step.weight.shape[0])


def _lengths(step: Step) -> tuple[float, float]:
    step_size, epsilon = step.rule[:2]
    return step_size, 0.0 if epsilon is None else epsilon
