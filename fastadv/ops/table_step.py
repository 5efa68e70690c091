r"""A step of a table's perturbation: from the gradient at the positions to the positions' next embedding, in one call.

.. math::
    g_s = \sum_{i = starts_s}^{stops_s - 1} grad[order_i], \qquad
    r \leftarrow \Pi\big(r + \text{step} \cdot d(g)\big), \qquad
    embedded_n = round(W[ids_n] + r[slot_n])

Defined as `segment_sum`, `ascend` and `gather_perturb`, one after the other. In one call each word's row is computed
once and copied to its positions, and long buffers are read and written from front to back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.rule import Rule
from fastadv.arguments.segments import Segments
from fastadv.native.table_step import table_step as native_table_step
from fastadv.ops.ascend import eager as ascend
from fastadv.ops.dispatch import Backend, Op, in_place, triton
from fastadv.ops.segment_sum import eager as segment_sum
from fastadv.ops.segment_sum import rows_of


@torch.no_grad()
def eager(
    delta: Tensor, grad: Tensor, skipped: Tensor, rule: Rule, groups: Segments, lookup: Lookup, room: Tensor
) -> None:
    """The op in plain PyTorch."""
    rule.check("table_step", delta.dim())
    weight, ids, _, embedded = lookup
    signatures.TABLE_STEP.check_shapes((delta, room, skipped, weight, ids, embedded, grad, *groups))
    room.copy_(segment_sum(grad, *groups[1:]))
    ascend(delta, room, None, skipped, rule, lookup._replace(slot=groups.slot.view(ids.shape)))


def unpacked(delta: Tensor, grad: Tensor, skipped: Tensor, *flat: Any) -> tuple[Any, ...]:
    """The schema's flat list as backends take it."""
    weight, ids, embedded, room = flat[9:]
    groups = Segments(flat[5].reshape(-1), *flat[6:9])
    return delta, grad, skipped, Rule._make(flat[:5]), groups, Lookup(weight, ids, None, embedded), room


OP = Op(
    "table_step",
    "(Tensor(a!) delta, Tensor grad, Tensor(b!) skipped, float step_size, float? epsilon, str direction, str ball, "
    "int group, Tensor slot, Tensor order, Tensor starts, Tensor stops, Tensor weight, Tensor ids, "
    "Tensor(c!) embedded, Tensor(d!) room) -> ()",
    eager=eager,
    fake=in_place,
    backends=[Backend("C++", "cpu", native_table_step, native.reason), triton("table_step")],
    unpack=unpacked,
)


def table_step(
    delta: Tensor,
    grad: Tensor,
    groups: Segments,
    *,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
    weight: Tensor,
    ids: Tensor,
    embedded: Tensor,
    room: Tensor,
    fused: bool | None = None,
) -> None:
    """Move the rows `delta` [R, D] up the sums of `grad` [N, D], in place, and look `ids` up into `embedded`.

    Args:
        delta: [R, D], float32 or float64: the perturbation of each segment; moved in place.
        grad: [N, D], the positions' gradient.
        groups: `segments(ids, V)`, trimmed or not; it has R segments.
        skipped: as in `ascend`, like the four that follow.
        step_size: the length of the step.
        epsilon: the ball's radius, or None.
        direction: "l2", "sign" or "max".
        ball: "l2", "linf", "unit" or "none".
        group: 0: the rows have one norm; 1: each has its own.
        weight: the table [V, D].
        ids: the N ids that `groups` are of.
        embedded: the result, [*ids.shape, D] in the table's dtype.
        room: like delta, for what is computed on the way; its contents mean nothing afterwards.
        fused: which backend.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not fit.
        IndexError: an index that points outside, or groups of other ids (on the CPU).

    Examples:
        >>> from fastadv.ops import segments
        >>> table, ids, skipped = torch.zeros(3, 2), torch.tensor([2, 0, 2]), torch.zeros((), dtype=torch.int64)
        >>> groups, grad, out = segments(ids, 3).trimmed(), torch.tensor([[3.0, 0], [0, 0], [0, 4]]), torch.empty(3, 2)
        >>> r, g = torch.zeros(2, 2), torch.empty(2, 2)
        >>> rule = {"step_size": 1.0, "epsilon": 0.5, "direction": "l2", "ball": "l2", "group": 0}
        >>> table_step(r, grad, groups, skipped=skipped, weight=table, ids=ids, embedded=out, room=g, **rule)
        >>> out
        tensor([[0.3000, 0.4000],
                [0.0000, 0.0000],
                [0.3000, 0.4000]])
    """
    rule = Rule(step_size, epsilon, direction, ball, group)
    OP.on(delta, fused)(delta, rows_of(grad), skipped, rule, groups, Lookup(weight, ids, None, embedded), room)
