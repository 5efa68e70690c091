"""moment_step on a GPU: both moments, the step, the ball and the next forward's input in one pass over memory.

Where a group is a row, the row stays in registers and that is one launch; otherwise one launch adds up the squares that
the ball needs, and what is not finite, and one more moves. Nothing waits for the host, and results repeat bit for bit.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.arguments import moments as numbers
from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.moments import Moments
from fastadv.arguments.rule import Rule
from fastadv.arguments.tensors import row_stride
from fastadv.kernels import gather_perturb as lookups
from fastadv.kernels.ascend import LEAST, LONGEST_ROW, TALLEST, TILE, Step, cut, moved, table
from fastadv.kernels.common import launch, over, pointer, power_of_two, wide
from fastadv.kernels.moment_kernels import SUMS, moment_move_kernel, moment_rows_kernel, moment_sums_kernel
from fastadv.native.launch import fitted

PROGRAMS = 384  # that add up: half as many as ascend's, of twice the size, are one wave
WARPS = 8  # of a tile, which four tensors come with: with 4, registers of float64 would lie in memory


class MomentStep(NamedTuple):
    """A step, and its moments."""

    step: Step
    moments: Tensor
    by: Moments

    def planes(self) -> tuple[Tensor, Tensor]:
        """M (where there is none, some other tensor) and v."""
        return self.moments[0], self.moments[-1]

    def constants(self) -> dict[str, Any]:
        """Those of every kernel."""
        rule = self.step.rule
        return {
            "BALL": rule.ball if rule.bounded else "none",
            "MASKED": self.step.mask is not None,
            "BOTH": len(self.moments) > 1,
            "WIDE": wide(self.step.delta.dtype),
        }


def moment_step(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    moments: Tensor,
    rule: Rule,
    by: Moments,
    lookup: Lookup | None = None,
    starts: Tensor | None = None,
) -> None:
    """`fastadv.ops.moment_step`; `fastadv.arguments.signatures` lists the tensors.

    With `slot` the lookup is a launch of its own: many positions take one row.
    """
    numbers.check(rule, delta, moments)
    *tensors, moments = fitted(*signatures.moment_step(delta, grad, mask, skipped, moments, lookup, starts))
    if lookup is None or lookup.slot is None:
        _run(MomentStep(Step(rule, *tensors), moments, by))
    else:
        _run(MomentStep(Step(rule, *tensors[:5]), moments, by))
        weight, ids, embedded, slot = tensors[5:]
        lookups.write(weight, ids, delta, slot, embedded)
    increment_version((delta, moments, skipped) if lookup is None else (delta, moments, skipped, lookup.embedded))


def _run(what: MomentStep) -> None:
    """Launch what the groups need."""
    step = what.step
    delta, group = step.delta, step.rule.group
    groups, rows = math.prod(delta.shape[:group]), math.prod(delta.shape[group:-1])
    if step.starts is not None:
        groups, rows = len(step.starts) - 1, math.prod(delta.shape[:-1])
    if delta.numel() == 0 or groups == 0:
        return
    if step.starts is None and rows == 1 and delta.shape[-1] * delta.element_size() <= LONGEST_ROW // 2:
        _by_row(what, groups)
    else:
        _by_group(what, groups, rows)


def _by_row(what: MomentStep, rows: int) -> None:
    step, dim = what.step, what.step.delta.shape[-1]
    width = power_of_two(dim)
    height = min(max(TILE // width, 1), TALLEST)
    launch(
        moment_rows_kernel,
        (over(rows, height),),
        step.delta.device,
        *moved(step),
        *what.planes(),
        rows,
        dim,
        row_stride(step.grad),
        *table(step),
        *what.by,
        step.rule.epsilon or 0.0,
        **what.constants(),
        EMBEDS=step.weight is not None,
        ROWS=height,
        COLUMNS=width,
        num_warps=min(max(height * width // 128, 4), 16),
    )


def _by_group(what: MomentStep, groups: int, rows: int) -> None:
    step = what.step
    delta, dim = step.delta, step.delta.shape[-1]
    by = cut(groups, rows, dim, 1 if step.starts is None else LEAST, PROGRAMS)
    everything = groups * by.parts
    sums = torch.empty(SUMS * everything, dtype=torch.float64, device=delta.device)
    starts, stride = pointer(step.starts, delta), row_stride(step.grad)
    places = (by.parts, by.tiles, by.across, everything)
    constants = {**what.constants(), "RUNS": step.starts is not None, "ROWS": by.height, "COLUMNS": by.width}
    read = (sums, delta, step.grad, pointer(step.mask, delta), *what.planes(), starts, rows, dim, stride, *places)
    launch(
        moment_sums_kernel,
        (groups, by.parts),
        delta.device,
        *read,
        *what.by,
        **constants,
        STAGES=by.stages(by.parts),
        num_warps=WARPS,
    )
    launch(
        moment_move_kernel,
        (groups, by.movers),
        delta.device,
        sums,
        *moved(step),
        *what.planes(),
        starts,
        rows,
        dim,
        stride,
        *table(step),
        *places,
        *what.by,
        step.rule.epsilon or 0.0,
        **constants,
        EMBEDS=step.weight is not None,
        PARTS=power_of_two(by.parts),
        STAGES=by.stages(by.movers),
        num_warps=WARPS,
    )
