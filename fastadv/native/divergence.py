"""The launcher of csrc/divergence: every check, the outputs' allocation, then addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.native import checks

OP = "divergence"
# csrc/divergence.h has the same codes.
KINDS = {"symmetric_kl": 0, "kl": 1, "js": 2, "mse": 3}
Result = tuple[Tensor, Tensor, Tensor]


def divergence(
    logits: Tensor, target: Tensor, weights: Tensor, kind: str, for_logits: bool, for_target: bool
) -> Result:
    """The weighted divergence of each row, and its gradients; nothing is mutated.

    `fastadv.ops.divergence` has the formulas. The result does not depend on the number of threads.

    Args:
        logits: [N, C], float32, float64, bfloat16 or float16; rows may be strided or expanded, elements of a row not.
        target: [N, C], likewise, in the dtype of `logits`.
        weights: [N], float32 (float64 for float64), contiguous. A row whose weight is zero is not read.
        kind: "symmetric_kl", "kl", "js" or "mse".
        for_logits: whether the gradient by `logits` is wanted.
        for_target: whether that by `target` is.

    Returns:
        The weighted divergences [N] in the dtype of `weights`, and the gradients of their sum by `logits` and `target`,
        [N, C] in the dtype of those; empty where they are not wanted.

    Raises:
        TypeError: dtypes that differ or are not served, or a tensor without plain memory.
        ValueError: an unknown kind; a shape, stride or device that does not fit.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Example:
        >>> logits, target = torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> divergence(logits, target, torch.ones(1), "mse", True, False)
        (tensor([0.5000]), tensor([[ 0., -1.]]), tensor([]))
    """
    extension = checks.extension_on_cpu(OP, logits)
    values, grad_logits, grad_target = check(logits, target, weights, kind, for_logits, for_target)
    call = extension.DivergenceCall(
        checks.DTYPES[logits.dtype],
        checks.address(OP, "logits", logits),
        checks.address(OP, "target", target),
        logits.stride(0),
        target.stride(0),
        checks.address(OP, "weights", weights),
        values.data_ptr(),
        grad_logits.data_ptr() if for_logits else 0,
        grad_target.data_ptr() if for_target else 0,
        *logits.shape,
        KINDS[kind],
    )
    extension.divergence_cpu(call, torch.get_num_threads())
    return values, grad_logits, grad_target


def check(logits: Tensor, target: Tensor, weights: Tensor, kind: str, for_logits: bool, for_target: bool) -> Result:
    """Room for the result, if everything is as `divergence` says.

    Raises:
        TypeError, ValueError: as `divergence` does.
    """
    if kind not in KINDS:
        raise ValueError(f"{OP}: kind must be one of {', '.join(map(repr, KINDS))}, not {kind!r}")
    for name, tensor in (("logits", logits), ("target", target)):
        checks.dtype_code(OP, name, tensor)
        checks.address(OP, name, tensor)
        checks.rows(OP, name, tensor)
    if target.dtype != logits.dtype or target.shape != logits.shape:
        raise (TypeError if target.dtype != logits.dtype else ValueError)(
            f"{OP}: target must be {logits.dtype} with shape {tuple(logits.shape)}, as logits is, but is "
            f"{target.dtype} with shape {tuple(target.shape)}"
        )
    if weights.shape != logits.shape[:1] or weights.dtype != checks.compute_dtype(logits.dtype):
        raise ValueError(
            f"{OP}: weights must be {checks.compute_dtype(logits.dtype)} with shape ({logits.shape[0]},), but is "
            f"{weights.dtype} with shape {tuple(weights.shape)}"
        )
    for name, tensor in (("target", target), ("weights", weights)):
        checks.same_device(OP, name, tensor, logits.device, "logits")
    checks.contiguous(OP, "weights", weights)
    wanted = [logits.new_empty(logits.shape if wants else (0,)) for wants in (for_logits, for_target)]
    return torch.empty_like(weights), wanted[0], wanted[1]
