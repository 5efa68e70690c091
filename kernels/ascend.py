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

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.rule import Rule
from fastadv.arguments.tensors import row_stride
from fastadv.kernels import gather_perturb as lookups
from fastadv.kernels.ascend_by_group import SUMS, move_kernel, sums_kernel, unit_kernel
from fastadv.kernels.ascend_by_row import rows_kernel
from fastadv.kernels.common import columns, launch, over, pointer, power_of_two, wide
from fastadv.native.flags import flag_on
from fastadv.native.launch import fitted

LONGEST_ROW = 1 << 15  # bytes of a perturbation that a program keeps in registers
TILE, TALLEST = 1024, 8  # elements of a tile, and rows at most: every row has addresses of its own
STAGES = 3  # tiles under way at a time
PROGRAMS = 768  # that add up: one wave, on an A100 too. Fixed, so that sums do not depend on the device
MOVERS = 8192  # programs that move: many waves, so that the last one does not show
LEAST = 8  # programs of a run: most runs that starts have room for may have no row
SUMS_PER_TILE = 128  # of its group that a mover reads: more of them, and it takes more tiles


class Step(NamedTuple):
    """The arguments of a step, checked; weight, ids and embedded come together."""

    rule: Rule
    delta: Tensor
    grad: Tensor
    mask: Tensor | None
    skipped: Tensor
    starts: Tensor | None = None
    weight: Tensor | None = None
    ids: Tensor | None = None
    embedded: Tensor | None = None

    def constants(self) -> dict[str, Any]:
        """The constants of the kernels that move."""
        return {
            "DIRECTION": self.rule.direction,
            "BALL": self.rule.ball if self.rule.bounded else "none",
            "MASKED": self.mask is not None,
        }


def ascend(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    rule: Rule,
    lookup: Lookup | None = None,
    starts: Tensor | None = None,
) -> None:
    """`fastadv.ops.ascend`; `fastadv.arguments.signatures` lists the tensors.

    With `slot` the lookup is a launch of its own: many positions take one row. Starts are not looked at, which would
    wait for the device: what lies outside is left out.
    """
    rule.check("ascend", delta.dim())
    tensors = fitted(*signatures.ascend(delta, grad, mask, skipped, lookup, starts))
    if lookup is None or lookup.slot is None:
        run(Step(rule, *tensors))
    else:
        run(Step(rule, *tensors[:5]))
        weight, ids, embedded, slot = tensors[5:]
        lookups.write(weight, ids, delta, slot, embedded)
    increment_version((delta, skipped) if lookup is None else (delta, skipped, lookup.embedded))


def run(step: Step) -> None:
    """Launch what the groups need."""
    delta, group = step.delta, step.rule.group
    groups, rows = math.prod(delta.shape[:group]), math.prod(delta.shape[group:-1])
    if step.starts is not None:
        groups, rows = len(step.starts) - 1, math.prod(delta.shape[:-1])
    if delta.numel() == 0 or groups == 0:
        return
    if step.starts is not None:
        _by_group(step, groups, rows)
    elif rows == 1 and delta.shape[-1] * delta.element_size() <= LONGEST_ROW:
        _by_row(step, groups)
    else:
        _by_group(step, groups, rows)


def _by_row(step: Step, rows: int) -> None:
    dim = step.delta.shape[-1]
    width = power_of_two(dim)
    height = min(max(TILE // width, 1), TALLEST)
    launch(
        rows_kernel,
        (over(rows, height),),
        step.delta.device,
        *moved(step),
        rows,
        dim,
        row_stride(step.grad),
        *table(step),
        *_lengths(step),
        **step.constants(),
        EMBEDS=step.weight is not None,
        WIDE=wide(step.delta.dtype),
        ROWS=height,
        COLUMNS=width,
        num_warps=min(max(height * width // 256, 4), 16),
    )


class Cut(NamedTuple):
    """How groups of many rows are cut into tiles, which `parts` programs of a group add up, and `movers` move."""

    height: int
    width: int
    across: int  # tiles beside each other
    tiles: int
    parts: int
    movers: int

    def stages(self, programs: int) -> int:
        """Of a program's loop over its tiles: none where it has one."""
        return STAGES if self.tiles > programs else 1


@functools.lru_cache(1024)
def cut(groups: int, rows: int, dim: int, least: int = 1, programs: int = PROGRAMS) -> Cut:
    """The cut of so many groups [rows, dim], which at least so many programs add up, if they have the tiles."""
    width = columns(dim, most=TILE)
    height = min(max(TILE // width, 1), TALLEST)
    across = over(dim, width)
    tiles = over(rows, height) * across
    parts = min(tiles, max(programs // groups, least))
    movers = min(over(tiles, over(parts, SUMS_PER_TILE)), max(MOVERS // groups, least))
    return Cut(height, width, across, tiles, parts, movers)


def _by_group(step: Step, groups: int, rows: int) -> None:
    delta, dim = step.delta, step.delta.shape[-1]
    by = cut(groups, rows, dim, 1 if step.starts is None else LEAST)
    everything = groups * by.parts
    sums = torch.empty(SUMS * everything, dtype=torch.float64, device=delta.device)
    starts = pointer(step.starts, delta)
    read = (sums, delta, step.grad, pointer(step.mask, delta), starts, rows, dim, row_stride(step.grad))
    places = (by.parts, by.tiles, by.across, everything)
    tile = {"STAGES": by.stages(by.parts), "ROWS": by.height, "COLUMNS": by.width}
    constants = {**step.constants(), "RUNS": step.starts is not None}
    some = {"PARTS": power_of_two(by.parts)}
    launch(sums_kernel, (groups, by.parts), delta.device, *read, *places, **constants, **tile)
    if constants["BALL"] == "unit":
        without = {name: constants[name] for name in ("DIRECTION", "MASKED", "RUNS")}
        step_size = step.rule.step_size
        launch(unit_kernel, (groups, by.parts), delta.device, *read, *places, step_size, **without, **some, **tile)
    launch(
        move_kernel,
        (groups, by.movers),
        delta.device,
        sums,
        *moved(step),
        starts,
        rows,
        dim,
        row_stride(step.grad),
        *table(step),
        *places,
        *_lengths(step),
        **constants,
        EMBEDS=step.weight is not None,
        WIDE=wide(delta.dtype),
        **some,
        STAGES=by.stages(by.movers),
        ROWS=by.height,
        COLUMNS=by.width,
    )


def moved(step: Step) -> tuple[Tensor, ...]:
    """The tensors of a kernel that moves."""
    delta = step.delta
    optional = (pointer(tensor, delta) for tensor in (step.weight, step.ids, step.embedded))
    return (delta, step.grad, pointer(step.mask, delta), step.skipped, *optional, flag_on(delta.device))


def table(step: Step) -> tuple[int, int]:
    """How far apart the rows of the words' table are, and how many it has."""
    return (0, 0) if step.weight is None else (step.weight.stride(0), step.weight.shape[0])


def _lengths(step: Step) -> tuple[float, float]:
    return step.rule.step_size, step.rule.epsilon or 0.0
