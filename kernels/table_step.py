"""table_step on a GPU: the launches of segment_sum, ascend and gather_perturb, one after the other."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.kernels import ascend, gather_perturb, segment_sum
from fastadv.native import checks
from fastadv.native import table_step as checked


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
    """`fastadv.ops.table_step`; tensors as `fastadv.native.table_step` takes them.

    A segment that mixes several ids is not told here: looking would wait for the device.
    """
    rule = (step_size, epsilon, direction, ball, group)
    checked.check(delta, grad, skipped, rule, (slot, order, starts, stops), weight, ids, embedded, room)
    ids = checks.indices(checked.OP, "ids", ids)
    segment_sum.write(grad, order, starts, stops, room)
    ascend.run(ascend.Step(delta, room, room.shape[1], None, skipped, rule))
    gather_perturb.write(weight, ids, delta, slot.contiguous(), embedded)
    increment_version((delta, skipped, embedded, room))
