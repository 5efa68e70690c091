"""The launcher of csrc/divergence.h."""

from __future__ import annotations

from torch import Tensor

from fastadv.arguments import signatures
from fastadv.arguments.kinds import KINDS, kind_code
from fastadv.native.launch import Launch

__all__ = ["KINDS", "Result", "divergence"]

Result = tuple[Tensor, Tensor, Tensor]

_RUN = Launch("divergence_cpu", signatures.DIVERGENCE)


def divergence(
    logits: Tensor, target: Tensor, weights: Tensor, kind: str, for_logits: bool, for_target: bool
) -> Result:
    """The weighted divergence of each row, and the gradients of their sum: empty where they are not wanted.

    `fastadv.ops.divergence` has the formulas. A row whose weight is zero is not read. The result does not depend on the
    number of threads.

    Raises:
        TypeError: dtypes that differ or are not served, or a tensor without plain memory.
        ValueError: an unknown kind; a shape, stride or device that does not fit.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Examples:
        >>> logits, target = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> divergence(logits, target, torch.ones(1), "mse", True, False)
        (tensor([0.5000]), tensor([[ 0., -1.]]), tensor([]))
    """
    found: Result = _RUN((logits, target, weights), kind_code(kind), for_logits, for_target)
    return found
