r"""ascend on a GPU: delta <- ball(delta + step * d(g)), and the next forward's W[ids] + delta in the same pass.

With u = g (sign(g) for the sign), a = step / |u| and the sums uu, du and dd of the squares and products of u and
delta, the moved perturbation has the norm

.. math:: |\delta + a u|^2 = dd + 2 a \, du + a^2 uu

so that one pass that adds up and one that moves are enough. Where a group is a row, the row stays in registers and both
are one launch. Otherwise `sums_kernel` leaves the sums of its tiles, and every program of `move_kernel` adds all of
its group's up again, in an order that is always the same: nothing but the count of skipped groups is atomic, nothing
waits for the host, and results repeat bit for bit. Only the unit ball needs a third launch, which measures what has
moved.

Everything is computed in float64 and rounded once. Products of float32 are exact there, so that gradients of 1e30 and
1e-30 need no scaling and the formula above may cancel; what costs is memory. (For float64 tensors squares beyond 1e308
are not finite, and such a group takes no step; the C++ version goes further.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.kernels import gather_perturb as lookups
from fastadv.kernels.ascend_by_group import SUMS, move_kernel, sums_kernel, unit_kernel
from fastadv.kernels.ascend_by_row import rows_kernel
from fastadv.kernels.common import columns, launch, pointer, wide
from fastadv.native import ascend as checked
from fastadv.native import checks
from fastadv.native.flags import flag_on

OP = "ascend"
LONGEST_ROW = 8192  # elements that a program keeps in registers
TILE, TALLEST = 1024, 8  # elements of a tile, and rows at most: every row has addresses of its own
PROGRAMS = 1024  # of a launch over groups; fixed, so that sums do not depend on the device


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
