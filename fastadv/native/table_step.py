"""The launcher of csrc/table_step: every check, then addresses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.native import ascend, checks

OP = "table_step"


def table_step(
    delta: Tensor,
    grad: Tensor,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
    slot: Tensor,
    order: Tensor,
    starts: Tensor,
    stops: Tensor,
    weight: Tensor,
    ids: Tensor,
    embedded: Tensor,
    room: Tensor,
) -> None:
    """`segment_sum` of `grad`, `ascend` of `delta` along it, and the lookup of `ids` into `embedded`.

    Args:
        delta: [R, D], float32 or float64, contiguous; mutated, like `embedded`, `skipped` and `room`.
        grad: [N, D], in delta's dtype, or bfloat16 or float16 for a float32 delta; rows may be strided or expanded.
        skipped: as in `fastadv.native.ascend`, like the five that follow.
        step_size: the length of the step.
        epsilon: the ball's radius, or None.
        direction: "l2", "sign" or "max".
        ball: "l2", "linf", "unit" or "none".
        group: 0 or 1.
        slot: [N] or the shape of ids, int64; this and the three that follow as `segments(ids)` makes them.
        order: [N].
        starts: [R + 1].
        stops: [R].
        weight: as in `fastadv.native.ascend`, like the two that follow.
        ids: N of them.
        embedded: [*ids.shape, D].
        room: [R, D] like delta, for what is computed on the way; its contents mean nothing afterwards.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that does not fit.
        IndexError: an index that points outside, or a segment of several ids; nothing has been written then.
        RuntimeError: the extension is not there for this device.
    """
    extension = checks.extension_on_cpu(OP, delta)
    rule = (step_size, epsilon, direction, ball, group)
    check(delta, grad, skipped, rule, (slot, order, starts, stops), weight, ids, embedded, room)
    ids, slot = checks.indices(OP, "ids", ids), slot.contiguous()
    rows, dim = delta.shape
    step = ascend.step_call(OP, extension, delta, room, dim, None, skipped, rule)
    sums = extension.SegmentSumCall(
        checks.DTYPES[grad.dtype],
        checks.address(OP, "grad", grad),
        grad.stride(0),
        grad.shape[0],
        order.data_ptr(),
        starts.data_ptr(),
        stops.data_ptr(),
        room.data_ptr(),
        rows,
        dim,
    )
    lookup = ascend.lookup_call(OP, extension, delta, weight, ids, slot, embedded)
    extension.table_step_cpu(step, sums, lookup, torch.get_num_threads())
    increment_version((delta, skipped, embedded, room))


def check(
    delta: Tensor,
    grad: Tensor,
    skipped: Tensor,
    rule: ascend.Rule,
    groups: tuple[Tensor, Tensor, Tensor, Tensor],
    weight: Tensor,
    ids: Tensor,
    embedded: Tensor,
    room: Tensor,
) -> None:
    """Raises TypeError or ValueError unless all is as `table_step` says; `groups` is slot, order, starts and stops."""
    slot, *positions = groups
    ascend.check_rule(OP, delta, *rule[2:])
    _check_room(delta, room)
    ascend.check_step(OP, delta, room, None, skipped)
    ascend.check_embedding(OP, delta, weight, ids, slot, embedded)
    _check_positions(delta, grad, ids, *positions)


def _check_room(delta: Tensor, room: Tensor) -> None:
    if room.dtype != delta.dtype:
        raise TypeError(f"{OP}: room must be {delta.dtype}, as delta is, but is {room.dtype}")
    if room.shape != delta.shape:
        raise ValueError(f"{OP}: room must have delta's shape {tuple(delta.shape)}, but has {tuple(room.shape)}")
    checks.contiguous(OP, "room", room)


def _check_positions(delta: Tensor, grad: Tensor, ids: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> None:
    checks.same_device(OP, "grad", grad, delta.device)
    checks.goes_with(OP, "grad", grad, delta)
    checks.rows(OP, "grad", grad)
    count, rows = ids.numel(), delta.shape[0]
    if grad.shape != (count, delta.shape[1]):
        raise ValueError(f"{OP}: grad must be {(count, delta.shape[1])}, but has shape {tuple(grad.shape)}")
    for name, plan, length in (("order", order, count), ("starts", starts, rows + 1), ("stops", stops, rows)):
        checks.plan(OP, name, plan, length, delta.device)
