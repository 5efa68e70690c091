"""table_step on a GPU: the launches of segment_sum, ascend and gather_perturb, one after the other."""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.rule import Rule
from fastadv.arguments.segments import Segments
from fastadv.kernels import ascend, gather_perturb, segment_sum
from fastadv.native.launch import fitted


def table_step(
    delta: Tensor, grad: Tensor, skipped: Tensor, rule: Rule, groups: Segments, lookup: Lookup, room: Tensor
) -> None:
    """`fastadv.ops.table_step`; `fastadv.arguments.signatures` lists the tensors.

    A segment that mixes several ids is not told here: looking would wait for the device.
    """
    rule.check("table_step", delta.dim())
    tensors = (delta, room, skipped, lookup.weight, lookup.ids, lookup.embedded, grad, *groups)
    _, _, _, weight, ids, embedded, grad, slot, order, starts, stops = fitted(signatures.TABLE_STEP, tensors)
    segment_sum.write(grad, order, starts, stops, room)
    ascend.run(ascend.Step(rule, delta, room, None, skipped))
    gather_perturb.write(weight, ids, delta, slot, embedded)
    increment_version((delta, skipped, embedded, room))
