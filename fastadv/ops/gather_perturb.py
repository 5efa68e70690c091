r"""Look words up and add their perturbation, in one op.

.. math:: out_n = round(W[ids_n] + \delta_n), \qquad\text{or}\qquad out_n = round(W[ids_n] + r[slot_n])

`weight` [V, D] in any floating dtype, `ids` int64 or int32 of any shape, `delta` [*ids.shape, D] (or, with `slot`
of ids' shape, the rows [R, D] that slot points into), float32 (float64 for a float64 weight) -> [*ids.shape, D] in
the weight's dtype. The sum is taken in the perturbation's dtype and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv import native
from fastadv.native.gather_perturb import gather_perturb as native_gather_perturb
from fastadv.ops.dispatch import Backend, Op


def eager(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    """The op in plain PyTorch."""
    rows = F.embedding(ids, weight)
    if delta is None:
        return rows
    added = delta if slot is None else F.embedding(slot, delta)
    return (rows.to(added.dtype) + added).to(weight.dtype)


def fake(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    """The op's shape and dtype."""
    return weight.new_empty((*ids.shape, weight.shape[1]))


_reason = native.reason()
_unchecked = "compiled, but not yet checked on a GPU" if native.cuda_compiled() else "not compiled"
OP = Op(
    "gather_perturb",
    "(Tensor weight, Tensor ids, Tensor? delta, Tensor? slot) -> Tensor",
    eager=eager,
    fake=fake,
    backends=[
        Backend("C++", "cpu", None if _reason else native_gather_perturb, _reason),
        Backend("CUDA C++", "cuda", None, _unchecked),
    ],
)


class _GatherPerturb(torch.autograd.Function):
    """Differentiable, and twice so: its backward is made of differentiable ops."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, delta: Tensor, padding_idx: int, fused: bool | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocabulary, ctx.padding_idx, ctx.delta_dtype = weight.shape[0], padding_idx, delta.dtype
        out: Tensor = OP.choose(weight.device.type, fused)(weight, ids, delta, None)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (grad,) = ctx.saved_tensors, grads
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_weight = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.vocabulary, ctx.padding_idx, False)
        return grad_weight, None, grad.to(ctx.delta_dtype), None, None


def gather_perturb(
    weight: Tensor, ids: Tensor, delta: Tensor, *, padding_idx: int | None = None, fused: bool | None = None
) -> Tensor:
    """`W[ids] + delta` with gradients for `weight` and `delta`; the row `padding_idx` gets none, as in `nn.Embedding`.

    Raises:
        IndexError: an id outside the table (on the CPU).
    """
    padding = -1 if padding_idx is None else padding_idx
    out: Tensor = _GatherPerturb.apply(weight, ids, delta, padding, fused)  # type: ignore[no-untyped-call]
    return out
