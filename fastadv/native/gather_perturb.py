"""The launchers of csrc/gather_perturb and its backward: every check, the output's allocation, then addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastadv.native import checks

OP = "gather_perturb"
BACKWARD = "gather_perturb_backward"


def gather_perturb(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    r"""Look rows up and add their perturbation, rounded once.

    .. math:: out_n = round(W[ids_n] + \delta_n), \quad round(W[ids_n] + \delta[slot_n]), \quad\text{or}\quad W[ids_n]

    Nothing is mutated.

    Args:
        weight: [V, D], float32, float64, bfloat16 or float16; rows may be strided, elements of a row may not.
        ids: any shape, int64 or int32.
        delta: float32 (float64 for a float64 weight), contiguous: [*ids.shape, D], or [R, D] with `slot`; or None.
        slot: int64, of the shape of `ids`: which row of `delta` each position takes, -1: none; or None.

    Returns:
        [*ids.shape, D] in the weight's dtype, contiguous.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit.
        IndexError: an id outside the table or a slot outside `delta`; nothing has been read then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Example:
        >>> table = torch.arange(6.0).view(3, 2)
        >>> gather_perturb(table, torch.tensor([2, 0]), torch.full((2, 2), 0.5), None)
        tensor([[4.5000, 5.5000],
                [0.5000, 1.5000]])
    """
    extension = checks.extension_on_cpu(OP, weight)
    ids, slot = check(weight, ids, delta, slot)
    out = weight.new_empty((*ids.shape, weight.shape[1]))
    call = extension.GatherPerturbCall(
        checks.DTYPES[weight.dtype],
        checks.address(OP, "weight", weight),
        weight.stride(0),
        weight.shape[0],
        checks.address(OP, "ids", ids),
        0 if delta is None else checks.address(OP, "delta", delta),
        0 if slot is None else checks.address(OP, "slot", slot),
        0 if delta is None or slot is None else delta.shape[0],
        out.data_ptr(),
        ids.numel(),
        weight.shape[1],
    )
    extension.gather_perturb_cpu(call, torch.get_num_threads())
    return out


def gather_perturb_backward(
    table_grad: Tensor, grads: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor, padding_idx: int
) -> None:
    r"""Add the gradients of positions to the rows of their ids.

    .. math:: G[w] \leftarrow round\Big(G[w] + \sum_g \sum_{i:\, ids_i = w} g_i\Big)

    `table_grad` is mutated, in touched rows alone, and its version counter rises.

    Args:
        table_grad: [V, D], float32, float64, bfloat16 or float16; rows may be strided, but must not overlap.
        grads: up to 64 of [N, D], each in the table's dtype or in float32; rows may be strided or expanded.
        ids: [N], int64 or int32.
        order: [N] int64, and
        starts: [rows + 1] int64: what `segments(ids, ...)` gives.
        padding_idx: the row that gets nothing; -1: there is none.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit, too many grads, or a plan of other ids.
        IndexError: an id outside the table, or a plan outside the positions; nothing has been written then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Example:
        >>> table_grad, grad = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [4.0]])
        >>> ids, order, starts = torch.tensor([2, 0, 2]), torch.tensor([1, 0, 2]), torch.tensor([0, 1, 3])
        >>> gather_perturb_backward(table_grad, [grad], ids, order, starts, -1)
        >>> table_grad.flatten()
        tensor([2., 0., 5.])
    """
    extension = checks.extension_on_cpu(BACKWARD, table_grad)
    if len(grads) > extension.most_grads:
        raise ValueError(f"{BACKWARD}: there are {len(grads)} grads, but at most {extension.most_grads} are served")
    ids = check_backward(table_grad, grads, ids, order, starts)
    wide = checks.compute_dtype(table_grad.dtype)
    call = extension.GatherPerturbBackwardCall(
        checks.DTYPES[table_grad.dtype],
        checks.address(BACKWARD, "table_grad", table_grad),
        table_grad.stride(0),
        table_grad.shape[0],
        [(checks.address(BACKWARD, "a grad", grad), grad.stride(0), grad.dtype == wide) for grad in grads],
        checks.address(BACKWARD, "ids", ids),
        checks.address(BACKWARD, "order", order),
        checks.address(BACKWARD, "starts", starts),
        starts.shape[0] - 1,
        ids.shape[0],
        table_grad.shape[1],
        padding_idx,
    )
    extension.gather_perturb_backward_cpu(call, torch.get_num_threads())
    torch.autograd.graph.increment_version(table_grad)


def check(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`ids` and `slot` as a launcher passes them on, int64 and contiguous, if everything is as `gather_perturb` says.

    Raises:
        TypeError, ValueError: as `gather_perturb` does.
    """
    checks.address(OP, "weight", weight)
    _check_weight(weight)
    ids = _check_indices("ids", ids, weight.device)
    slot = _check_slot(slot, ids, delta)
    if delta is not None:
        _check_delta(delta, weight, ids, slot)
    return ids, slot


def check_backward(table_grad: Tensor, grads: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """`ids` as a launcher passes them on, if everything is as `gather_perturb_backward` says.

    Raises:
        TypeError, ValueError: as `gather_perturb_backward` does.
    """
    checks.dtype_code(BACKWARD, "table_grad", table_grad)
    checks.address(BACKWARD, "table_grad", table_grad)
    _check_table_grad(table_grad)
    ids = _check_indices("ids", ids, table_grad.device, BACKWARD)
    if ids.dim() != 1:
        raise ValueError(f"{BACKWARD}: ids must be [N], but has shape {tuple(ids.shape)}")
    for grad in grads:
        _check_grad(grad, table_grad, ids.shape[0])
    checks.plan(BACKWARD, "order", order, ids.shape[0], table_grad.device)
    checks.plan(BACKWARD, "starts", starts, None, table_grad.device)
    if starts.shape[0] == 0:
        raise ValueError(f"{BACKWARD}: starts must be [rows + 1], but is empty")
    return ids


def _check_weight(weight: Tensor) -> None:
    checks.dtype_code(OP, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{OP}: weight must be a table [V, D], but has shape {tuple(weight.shape)}")
    checks.adjacent(OP, "weight", weight)


def _check_indices(name: str, indices: Tensor, device: torch.device, op: str = OP) -> Tensor:
    checks.same_device(op, name, indices, device)
    return checks.indices(op, name, indices)


def _check_slot(slot: Tensor | None, ids: Tensor, delta: Tensor | None) -> Tensor | None:
    if slot is None:
        return None
    if delta is None:
        raise ValueError(f"{OP}: slot says which row of delta to take, but delta is None")
    checks.same_device(OP, "slot", slot, ids.device)
    if slot.dtype != torch.int64:
        raise TypeError(f"{OP}: slot must be int64, but is {slot.dtype}")
    if slot.shape != ids.shape:
        raise ValueError(f"{OP}: slot has shape {tuple(slot.shape)}, but ids has {tuple(ids.shape)}")
    return slot.contiguous()


def _check_delta(delta: Tensor, weight: Tensor, ids: Tensor, slot: Tensor | None) -> None:
    checks.same_device(OP, "delta", delta, weight.device)
    wanted = checks.compute_dtype(weight.dtype)
    if delta.dtype != wanted:
        raise TypeError(f"{OP}: delta must be {wanted} for a {weight.dtype} table, but is {delta.dtype}")
    dim = weight.shape[1]
    if slot is None and delta.shape != (*ids.shape, dim):
        raise ValueError(f"{OP}: delta has shape {tuple(delta.shape)}, but ids and weight give {(*ids.shape, dim)}")
    if slot is not None and (delta.dim() != 2 or delta.shape[1] != dim):
        raise ValueError(f"{OP}: with slot, delta must be [R, {dim}], but has shape {tuple(delta.shape)}")
    checks.contiguous(OP, "delta", delta)


def _check_table_grad(table_grad: Tensor) -> None:
    checks.rows(BACKWARD, "table_grad", table_grad)
    if table_grad.shape[0] > 1 and table_grad.stride(0) < table_grad.shape[1]:
        raise ValueError(
            f"{BACKWARD}: the rows of table_grad overlap (strides {table_grad.stride()}); pass table_grad.contiguous()"
        )


def _check_grad(grad: Tensor, table_grad: Tensor, count: int) -> None:
    checks.same_device(BACKWARD, "a grad", grad, table_grad.device)
    wide = checks.compute_dtype(table_grad.dtype)
    if grad.dtype not in (table_grad.dtype, wide):
        raise TypeError(
            f"{BACKWARD}: a grad is {grad.dtype}, but must be {table_grad.dtype}, as table_grad is, or {wide}"
        )
    wanted = (count, table_grad.shape[1])
    if grad.shape != wanted:
        raise ValueError(f"{BACKWARD}: a grad has shape {tuple(grad.shape)}, but ids and table_grad give {wanted}")
    checks.rows(BACKWARD, "a grad", grad)
    checks.address(BACKWARD, "a grad", grad)
