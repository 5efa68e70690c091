"""The launcher of csrc/ascend.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.rule import Rule
from fastadv.native.launch import Launch


def _check(tensors: Sequence[Tensor], rule: Rule) -> None:
    rule.check("ascend", tensors[0].dim())


_RUN = {
    form: Launch("ascend_cpu", form, _check)
    for form in (signatures.ASCEND, signatures.ASCEND_BY_POSITION, signatures.ASCEND_BY_SLOT)
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
    r"""Move `delta` one step up `grad`, in place, and embed the next forward's words in the same pass.

    .. math::
        \delta \leftarrow \Pi\big(\delta + \text{step} \cdot d(g)\big), \qquad
        embedded_n = round(W[ids_n] + \delta_n) \quad\text{or}\quad round(W[ids_n] + \delta[slot_n])

    `fastadv.ops.ascend` lists the directions and balls, `fastadv.arguments.signatures` the tensors. Mutated: `delta`,
    `skipped` and `embedded`, which share no memory with each other or with what is read. The result does not depend on
    the number of threads.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride, device, direction or ball that does not fit, or starts that do not rise from 0 to
            the number of positions; nothing has been written then.
        IndexError: an id outside the table or a slot outside `delta`; nothing has been written then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Examples:
        >>> delta, skipped = torch.zeros(1, 2), torch.zeros((), dtype=torch.int64)
        >>> ascend(delta, torch.tensor([[3.0, 4.0]]), None, skipped, Rule(1.0, 0.5, "l2", "l2", 1))
        >>> delta
        tensor([[0.3000, 0.4000]])
    """
    form, tensors = signatures.ascend(delta, grad, mask, skipped, lookup, starts)
    _RUN[form](tensors, rule)
    increment_version((delta, skipped) if lookup is None else (delta, skipped, lookup.embedded))
