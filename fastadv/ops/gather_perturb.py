r"""Look words up and add their perturbation, in one op.

.. math:: out_n = round(W[ids_n] + \delta_n), \qquad\text{or}\qquad out_n = round(W[ids_n] + r[slot_n])

`weight` [V, D] in any floating dtype, `ids` int64 or int32 of any shape, `delta` [*ids.shape, D] (or, with `slot`
of ids' shape, the rows [R, D] that slot points into), float32 (float64 for a float64 weight) -> [*ids.shape, D] in
the weight's dtype. The sum is taken in the perturbation's dtype and rounded once. Where slot is -1, nothing is added.

Its backward goes to the touched rows alone, into a gradient that is there already:

.. math:: G[w] \leftarrow round\Big(G[w] + \sum_g \sum_{i:\, ids_i = w} g_i\Big)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastadv import native
from fastadv.arguments.segments import Segments
from fastadv.native.gather_perturb import gather_perturb as native_gather_perturb
from fastadv.native.gather_perturb import gather_perturb_backward as native_backward
from fastadv.ops.dispatch import Backend, Op, in_place, triton
from fastadv.ops.segment_sum import rows_of


def eager(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    """The op in plain PyTorch."""
    rows = F.embedding(ids, weight)
    if delta is None or (slot is not None and delta.shape[0] == 0):
        return rows if slot is None else _nothing_to_add(rows, slot)
    added = delta if slot is None else F.embedding(torch.where(slot == -1, 0, slot), delta)
    summed = (rows.to(added.dtype) + added).to(weight.dtype)
    return summed if slot is None else torch.where((slot == -1).unsqueeze(-1), rows, summed)


def _nothing_to_add(rows: Tensor, slot: Tensor) -> Tensor:
    """No perturbation has a row, so every slot must say so; on CUDA looking would be a sync."""
    if slot.device.type == "cpu" and bool((slot != -1).any()):
        raise IndexError("gather_perturb: a slot is out of range for a perturbation of 0 rows")
    return rows


def fake(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    """The op's shape and dtype."""
    return weight.new_empty((*ids.shape, weight.shape[1]))


def eager_backward(
    table_grad: Tensor, grads: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor, padding_idx: int
) -> None:
    """The touched rows' gradient in plain PyTorch; no number that the host has to know.

    There is room for more segments than there may be. The empty ones repeat the last segment with its word and its
    value, so that whoever writes a row last writes the same.
    """
    rows = starts.shape[0] - 1
    if rows < 1 or table_grad.shape[1] == 0 or not grads:
        return
    wide = torch.promote_types(table_grad.dtype, torch.float32)
    sums = [F.embedding_bag(order, g.to(wide), starts, mode="sum", include_last_offset=True) for g in grads]
    last = (starts[:-1] < starts[1:]).sum() - 1
    segment = torch.minimum(torch.arange(rows, device=last.device), last)
    words = ids[order[starts[segment]]].to(torch.int64)
    before = table_grad.index_select(0, words)
    after = (before.to(wide) + sum(sums[1:], sums[0])[segment]).to(table_grad.dtype)
    table_grad.index_copy_(0, words, torch.where((words == padding_idx).unsqueeze(1), before, after))


OP = Op(
    "gather_perturb",
    "(Tensor weight, Tensor ids, Tensor? delta, Tensor? slot) -> Tensor",
    eager=eager,
    fake=fake,
    backends=[Backend("C++", "cpu", native_gather_perturb, native.reason), triton("gather_perturb")],
)
BACKWARD_OP = Op(
    "gather_perturb_backward",
    "(Tensor(a!) table_grad, Tensor[] grads, Tensor ids, Tensor order, Tensor starts, int padding_idx) -> ()",
    eager=eager_backward,
    fake=in_place,
    backends=[
        Backend("C++", "cpu", native_backward, native.reason),
        triton("gather_perturb", "gather_perturb_backward"),
    ],
)


class _GatherPerturb(torch.autograd.Function):
    """Differentiable, and twice so: its backward is made of differentiable ops."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        leaf: Tensor,
        ids: Tensor,
        added: Tensor | None,
        slot: Tensor | None,
        ready: Tensor | None,
        padding_idx: int,
        fused: bool | None,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.vocabulary, ctx.padding_idx, ctx.leaf_dtype = weight.shape[0], padding_idx, leaf.dtype
        if ready is not None:
            return ready.detach()  # an alias: the graph hangs on it, and not on the caller's buffer
        out: Tensor = OP.on(weight, fused)(weight, ids, added, slot)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (ids,), (grad,) = ctx.saved_tensors, grads
        grad_weight = grad_leaf = None
        if ctx.needs_input_grad[0]:
            rows = ids if ids.device.type == "cpu" else _left_out(ids, ctx.vocabulary, ctx.padding_idx)
            grad_weight = torch.ops.aten.embedding_dense_backward(grad, rows, ctx.vocabulary, ctx.padding_idx, False)
        if ctx.needs_input_grad[1]:
            grad_leaf = grad.to(ctx.leaf_dtype)
        return grad_weight, grad_leaf, None, None, None, None, None, None


def _left_out(ids: Tensor, vocabulary: int, padding_idx: int) -> Tensor:
    """Ids out of range, at which the forward on a GPU left a mark, made padding: torch's backward writes anywhere."""
    return torch.where((ids >= 0) & (ids < vocabulary), ids, padding_idx)


def gather_perturb(
    weight: Tensor,
    ids: Tensor,
    leaf: Tensor,
    *,
    added: Tensor | None,
    slot: Tensor | None = None,
    ready: Tensor | None = None,
    padding_idx: int | None = None,
    fused: bool | None = None,
) -> Tensor:
    """`W[ids] + added`, with gradients for `weight` and for `leaf`, which stands for whatever is added.

    Args:
        weight: [V, D].
        ids: any shape, int64 or int32.
        leaf: [*ids.shape, D], where the perturbation's gradient arrives, in its dtype. Never read; it may be expanded.
        added: [*ids.shape, D] (the leaf itself, for example), or [R, D] with `slot`; None: a lookup and nothing more.
        slot: int64, of the shape of `ids`: which row of `added` each position takes; -1: none.
        ready: [*ids.shape, D] in the weight's dtype, the result, where it is there already: nothing is computed.
        padding_idx: the row of `weight` that gets no gradient, as in `nn.Embedding`.
        fused: which backend.

    Raises:
        IndexError: an id outside the table, or a slot outside `added` (on the CPU).
        ValueError: shapes that do not fit, or `slot` without `added`.

    Examples:
        >>> table, leaf = torch.arange(4.0).view(2, 2), torch.zeros(3, 2, requires_grad=True)
        >>> r, slot = torch.full((1, 2), 0.5), torch.tensor([0, -1, 0])
        >>> out = gather_perturb(table, torch.tensor([1, 1, 0]), leaf, added=r, slot=slot)
        >>> out.detach()
        tensor([[2.5000, 3.5000],
                [2.0000, 3.0000],
                [0.5000, 1.5000]])
        >>> torch.autograd.grad(out.sum(), leaf)[0].shape
        torch.Size([3, 2])
    """
    _check(weight, ids, leaf, added, slot, ready)
    padding = -1 if padding_idx is None else padding_idx
    if not _differentiates(weight, leaf):
        return ready.detach() if ready is not None else OP.on(weight, fused)(weight, ids, added, slot)
    out: Tensor = _GatherPerturb.apply(weight, leaf, ids, added, slot, ready, padding, fused)  # type: ignore[no-untyped-call]
    return out


def _differentiates(weight: Tensor, leaf: Tensor) -> bool:
    """Whether the result needs a graph. In forward mode too, so that autograd can say that there is none."""
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and (leaf.requires_grad or weight.requires_grad)


def _check(
    weight: Tensor, ids: Tensor, leaf: Tensor, added: Tensor | None, slot: Tensor | None, ready: Tensor | None
) -> None:
    shape = (*ids.shape, weight.shape[1])
    if leaf.shape != shape:
        raise ValueError(f"gather_perturb: leaf has shape {tuple(leaf.shape)}, but ids and weight give {shape}")
    if slot is not None and added is None:
        raise ValueError("gather_perturb: slot says which row of added to take, but added is None")
    if ready is not None and (ready.shape != shape or ready.dtype != weight.dtype):
        raise ValueError(
            f"gather_perturb: ready must be {weight.dtype} with shape {shape}, but is {ready.dtype} with shape "
            f"{tuple(ready.shape)}"
        )


def gather_perturb_backward(
    table_grad: Tensor,
    grads: Sequence[Tensor],
    ids: Tensor,
    groups: Segments,
    *,
    padding_idx: int | None = None,
    fused: bool | None = None,
) -> None:
    """Add the gradients of positions to the rows of their ids, in place; only touched rows are read or written.

    Args:
        table_grad: [V, D], the weight's gradient so far.
        grads: each [*ids.shape, D] or [N, D], in the table's dtype or in float32; rows may be expanded.
        ids: [N] positions' ids, or any shape with N elements.
        groups: `segments(ids, V)`, with a mask or without: masked positions have a gradient as well.
        padding_idx: the row that gets nothing.
        fused: which backend.

    The sum is taken in float32 (float64 for a float64 table), over all of `grads`, and rounded once.

    Raises:
        IndexError: an id outside the table (on the CPU); nothing has been written then.
        TypeError, ValueError: dtypes or shapes that do not fit.

    Examples:
        >>> from fastadv.ops import segments
        >>> ids, table_grad = torch.tensor([2, 0, 2]), torch.ones(3, 1)
        >>> gather_perturb_backward(table_grad, [torch.tensor([[1.0], [2.0], [3.0]])], ids, segments(ids, 3))
        >>> table_grad.flatten()
        tensor([3., 1., 5.])
    """
    run = BACKWARD_OP.on(table_grad, fused)
    flat = [rows_of(grad) for grad in grads]
    with torch.no_grad():
        run(table_grad, flat, ids.reshape(-1), groups.order, groups.starts, -1 if padding_idx is None else padding_idx)
