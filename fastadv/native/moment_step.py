"""The launcher of csrc/moment_step.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.arguments import moments as numbers
from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.moments import Moments
from fastadv.arguments.rule import Rule
from fastadv.native.launch import Launch


def _check(tensors: Sequence[Tensor], rule: Rule, by: Moments) -> None:  # noqa: ARG001
    numbers.check(rule, tensors[0], tensors[-1])


_RUN = {
    form: Launch("moment_step_cpu", form, _check)
    for form in (signatures.MOMENT_STEP, signatures.MOMENT_STEP_BY_POSITION, signatures.MOMENT_STEP_BY_SLOT)
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
    r"""Move `delta` one step up by the moments of its gradient, in place, and embed the next forward's words.

    .. math::
        m \leftarrow \beta_1 m + (1 - \beta_1) g, \quad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \quad
        \delta \leftarrow \Pi\big(keep \, \delta + rate \, m / (\sqrt{v} / root + guard)\big)

    `fastadv.ops.moment_step` lists directions and balls, `fastadv.arguments.signatures` the tensors. Mutated: `delta`,
    `moments`, `skipped` and `embedded`, which share no memory with each other or with what is read. The result does not
    depend on the number of threads.

    Raises:
        TypeError, ValueError, IndexError: as `fastadv.native.ascend` does; nothing has been written then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Examples:
        >>> delta, moments, rule = torch.zeros(1, 2), torch.zeros(1, 1, 2), Rule(0.5, None, "rmsprop", "none", 1)
        >>> grad, skipped = torch.tensor([[3.0, 0.0]]), torch.zeros((), dtype=torch.int64)
        >>> moment_step(delta, grad, None, skipped, moments, rule, Moments.of(rule, 1))
        >>> delta
        tensor([[5., 0.]])
    """
    form, tensors = signatures.moment_step(delta, grad, mask, skipped, moments, lookup, starts)
    _RUN[form](tensors, rule, by)
    increment_version((delta, moments, skipped) if lookup is None else (delta, moments, skipped, lookup.embedded))
