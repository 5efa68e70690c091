r"""Look words up and add their perturbation, in one op.

.. math:: out_n = round(W[ids_n] + \delta_n), \qquad\text{or}\qquad out_n = round(W[ids_n] + r[slot_n])

`weight` [V, D] in any floating dtype, `ids` int64 or int32 of any shape, `delta` [*ids.shape, D] (or, with `slot`
of ids' shape, the rows [R, D] that slot points into; nothing is added where slot is -1), float32 (float64 for a
float64 weight) -> [*ids.shape, D] in the weight's dtype. The sum is taken in the perturbation's dtype and rounded once.

Its backward adds to a table's gradient in the rows that the batch touches, and reads and writes no others:

.. math:: G[id_s] \leftarrow round\Big(G[id_s] + \sum_p \sum_{i:\, ids_i = id_s} passes_{p,i}\Big)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv import native
from fastadv.native import gather_perturb as launchers
from fastadv.ops.dispatch import Backend, Op
from fastadv.ops.segment_sum import Segments, with_adjacent_elements
from fastadv.ops.segment_sum import eager as eager_segment_sum


def eager(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    """The op in plain PyTorch."""
    rows = F.embedding(ids, weight)
    if delta is None:
        return rows
    added = delta if slot is None else F.embedding(slot + 1, F.pad(delta, (0, 0, 1, 0)))  # slot -1: a row of zeros
    return (rows.to(added.dtype) + added).to(weight.dtype)


def fake(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:  # noqa: ARG001
    """The op's shape and dtype."""
    return weight.new_empty((*ids.shape, weight.shape[1]))


def eager_backward(
    grad: Tensor, passes: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor, padding_idx: int
) -> None:
    """The backward in plain PyTorch."""
    if not passes or ids.numel() == 0:
        return
    total = sum(each.to(torch.promote_types(each.dtype, torch.float32)) for each in passes)
    sums = eager_segment_sum(total, order, starts[:-1], starts[1:])  # type: ignore[arg-type]
    begins = starts[:-1].clamp(max=len(ids) - 1)
    rows = ids[order[begins]].long()
    # Segments that are empty stand behind the last that is not: they write what that one writes.
    last = (starts[:-1] < starts[-1]).sum() - 1
    sums = sums[torch.arange(len(sums), device=sums.device).clamp(max=last)]
    sums = sums.masked_fill((rows == padding_idx).unsqueeze(1), 0)
    grad[rows] = (grad[rows].to(sums.dtype) + sums).to(grad.dtype)


def fake_backward(
    grad: Tensor, passes: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor, padding_idx: int
) -> None:
    """In place: nothing to say about shapes."""


def _native_backward(
    grad: Tensor, passes: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor, padding_idx: int
) -> None:
    passes = [with_adjacent_elements(each) for each in passes]
    launchers.gather_perturb_backward(grad, passes, ids, order, starts, padding_idx)


_reason = native.reason()
_unchecked = "compiled, but not yet checked on a GPU" if native.cuda_compiled() else "not compiled"
OP = Op(
    "gather_perturb",
    "(Tensor weight, Tensor ids, Tensor? delta, Tensor? slot) -> Tensor",
    eager=eager,
    fake=fake,
    backends=[
        Backend("C++", "cpu", None if _reason else launchers.gather_perturb, _reason),
        Backend("CUDA C++", "cuda", None, _unchecked),
    ],
)
BACKWARD = Op(
    "gather_perturb_backward",
    "(Tensor(a!) grad, Tensor[] passes, Tensor ids, Tensor order, Tensor starts, int padding_idx) -> ()",
    eager=eager_backward,
    fake=fake_backward,
    backends=[
        Backend("C++", "cpu", None if _reason else _native_backward, _reason),
        Backend("CUDA C++", "cuda", None, _unchecked),
    ],
)


class _GatherPerturb(torch.autograd.Function):
    """Differentiable in `weight` and `leaf`, and twice so: its backward is made of differentiable ops."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        leaf: Tensor,
        ids: Tensor,
        delta: Tensor | None,
        slot: Tensor | None,
        ready: Tensor | None,
        padding_idx: int,
        fused: bool | None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocabulary, ctx.padding_idx, ctx.leaf_dtype = weight.shape[0], padding_idx, leaf.dtype
        if ready is not None:
            return ready.detach()  # a tensor of its own: the caller's must not become a part of the graph
        out: Tensor = OP.choose(weight.device.type, fused)(weight, ids, delta, slot)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (grad,) = ctx.saved_tensors, grads
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_weight = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.vocabulary, ctx.padding_idx, False)
        return grad_weight, grad.to(ctx.leaf_dtype), None, None, None, None, None, None


def gather_perturb(
    weight: Tensor,
    ids: Tensor,
    leaf: Tensor,
    *,
    delta: Tensor | None,
    slot: Tensor | None = None,
    ready: Tensor | None = None,
    padding_idx: int | None = None,
    fused: bool | None = None,
) -> Tensor:
    """`W[ids] + delta`, with gradients for `weight` and for `leaf`, which stands for whatever was added.

    Args:
        weight, ids: as above; the row `padding_idx` gets no gradient, as in `nn.Embedding`.
        leaf: [*ids.shape, D], never read: its gradient is that of the result.
        delta, slot: as above; None: a lookup and nothing more.
        ready: the result, if it is there already; nothing is computed then.

    Raises:
        IndexError: an id outside the table (on the CPU).
    """
    padding = -1 if padding_idx is None else padding_idx
    slot = None if delta is None else slot
    out: Tensor = _GatherPerturb.apply(weight, leaf, ids, delta, slot, ready, padding, fused)  # type: ignore[no-untyped-call]
    return out


@torch.no_grad()
def gather_perturb_backward(
    grad: Tensor,
    passes: Sequence[Tensor],
    ids: Tensor,
    groups: Segments,
    *,
    padding_idx: int | None = None,
    fused: bool | None = None,
) -> None:
    """Add the gradients [N, D] of lookups of `ids` [N], grouped by `segments`, to the table's gradient, in place."""
    padding = -1 if padding_idx is None else padding_idx
    BACKWARD.choose(grad.device.type, fused)(grad, passes, ids, groups.order, groups.starts, padding)
