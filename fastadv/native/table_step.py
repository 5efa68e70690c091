"""The launcher of csrc/table_step.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.rule import Rule
from fastadv.arguments.segments import Segments
from fastadv.native.launch import Launch


def _check(tensors: Sequence[Tensor], rule: Rule) -> None:
    rule.check("table_step", tensors[0].dim())


_RUN = Launch("table_step_cpu", signatures.TABLE_STEP, _check)


def table_step(
    delta: Tensor, grad: Tensor, skipped: Tensor, rule: Rule, groups: Segments, lookup: Lookup, room: Tensor
) -> None:
    """`segment_sum` of `grad`, `ascend` of `delta` along it, and the lookup of `ids` into `embedded`.

    Mutated: `delta`, `skipped`, `embedded` and `room`, whose contents mean nothing afterwards.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that does not fit.
        IndexError: an index that points outside, or a segment of several ids; nothing has been written then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.
    """
    _RUN((delta, room, skipped, lookup.weight, lookup.ids, lookup.embedded, grad, *groups), rule)
    increment_version((delta, skipped, lookup.embedded, room))
