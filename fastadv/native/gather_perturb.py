"""The launcher of csrc/gather_perturb: every check, the output's allocation, then addresses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.native import checks

OP = "gather_perturb"
_flags: dict[int, Tensor] = {}


def gather_perturb(weight: Tensor, ids: Tensor, delta: Tensor | None, slot: Tensor | None) -> Tensor:
    r"""Look rows up and add their perturbation, rounded once.

    .. math:: out_n = round(W[ids_n] + \delta_n), \quad round(W[ids_n] + \delta[slot_n]), \quad\text{or}\quad W[ids_n]

    Nothing is mutated.

    Args:
        weight: [V, D], float32, float64, bfloat16 or float16; rows may be strided, elements of a row may not.
        ids: any shape, int64 or int32.
        delta: float32 (float64 for a float64 weight), contiguous: [*ids.shape, D], or [R, D] with `slot`; or None.
        slot: int64, of the shape of `ids`: which row of `delta` each position takes, -1 for none; or None.

    Returns:
        [*ids.shape, D] in the weight's dtype, contiguous.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit.
        IndexError: on the CPU, an id outside the table or a slot outside `delta`; nothing has been read then. On
            CUDA such a row becomes zeros, and `check` raises.
        RuntimeError: the extension is not there for this device, or CUDA reports an error.

    Example:
        >>> table = torch.arange(6.0).view(3, 2)
        >>> gather_perturb(table, torch.tensor([2, 0]), torch.full((2, 2), 0.5), None)
        tensor([[4.5000, 5.5000],
                [0.5000, 1.5000]])
    """
    extension = checks.extension_for(OP, weight)
    table = checks.address(OP, "weight", weight)
    code = checks.dtype_code(OP, "weight", weight)
    checks.adjacent(OP, "weight", weight)
    ids = checks.indices(OP, "ids", ids, weight.device)
    slot = _check_slot(slot, ids, delta)
    if delta is not None:
        _check_delta(delta, weight, ids, slot)
    out = weight.new_empty((*ids.shape, weight.shape[1]))
    call = extension.GatherPerturbCall(
        code,
        table,
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
    if weight.device.type == "cpu":
        extension.gather_perturb_cpu(call, torch.get_num_threads())
    else:
        stream = torch.cuda.current_stream(weight.device).cuda_stream
        flag = _flag(weight.device)
        extension.gather_perturb_cuda(call, weight.device.index, stream, flag.data_ptr())
    return out


def gather_perturb_backward(
    grad: Tensor, passes: Sequence[Tensor], ids: Tensor, order: Tensor, starts: Tensor, padding_idx: int
) -> None:
    r"""Add to a table's gradient what the passes over a batch bring to its rows, in place.

    .. math:: grad[id_s] \mathrel{+}= \sum_p \sum_{i = starts_s}^{starts_{s+1} - 1} passes_p[order_i],
        \quad id_s = ids[order[starts_s]]

    Args:
        grad: [V, D], one of the four dtypes; rows may be strided. Mutated; its version counter moves.
        passes: each [N, D], in the dtype of `grad` or in the one it is computed in; rows may be strided.
        ids: [N] int64 or int32.
        order, starts: [N] and [S + 1] int64, as `segments` makes them.
        padding_idx: this row gets nothing; -1: none such.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that does not fit.
        IndexError: an index that points outside; nothing has been written then (on the CPU).
        RuntimeError: the extension is not there for this device.
    """
    op = f"{OP}_backward"
    extension = checks.extension_for(op, grad)
    table, code = checks.address(op, "grad", grad), checks.dtype_code(op, "grad", grad)
    checks.adjacent(op, "grad", grad)
    ids, order, starts = (
        checks.indices(op, name, tensor, grad.device)
        for name, tensor in (("ids", ids), ("order", order), ("starts", starts))
    )
    if order.shape != ids.shape or ids.dim() != 1 or starts.dim() != 1 or len(starts) == 0:
        raise ValueError(f"{op}: ids and order must be [N] and starts [S + 1], not {ids.shape}, {order.shape}, {starts.shape}")
    for each in passes:
        _check_pass(op, each, passes[0], grad, len(ids))
    if not passes:
        return
    addresses = torch.tensor([checks.address(op, "a pass", each) for each in passes])
    strides = torch.tensor([each.stride(0) for each in passes])
    call = extension.GatherPerturbBackwardCall(
        code,
        checks.dtype_code(op, "a pass", passes[0]),
        table,
        grad.stride(0),
        grad.shape[0],
        addresses.data_ptr(),
        strides.data_ptr(),
        len(passes),
        len(ids),
        ids.data_ptr(),
        order.data_ptr(),
        starts.data_ptr(),
        len(starts) - 1,
        grad.shape[1],
        padding_idx,
    )
    extension.gather_perturb_backward_cpu(call, torch.get_num_threads())
    increment_version(grad)


def _check_pass(op: str, each: Tensor, first: Tensor, grad: Tensor, count: int) -> None:
    checks.same_device(op, "a pass", each, grad.device)
    if each.dtype not in (grad.dtype, checks.compute_dtype(grad.dtype)) or each.dtype != first.dtype:
        raise TypeError(
            f"{op}: passes must all be {grad.dtype} or all {checks.compute_dtype(grad.dtype)} for this table, "
            f"but one is {each.dtype}"
        )
    if each.shape != (count, grad.shape[1]):
        raise ValueError(f"{op}: a pass has shape {tuple(each.shape)}, but ids and grad give {(count, grad.shape[1])}")
    checks.adjacent(op, "a pass", each)


def check(device: torch.device) -> None:
    """Waits for `device` and raises IndexError if a call there met an index out of range; clears the mark.

    On the CPU a call raises at once, so there is nothing to wait for.
    """
    if device.type != "cuda":
        return
    flag = _flags.get(torch.cuda.current_device() if device.index is None else device.index)
    if flag is not None and flag.item():
        flag.zero_()
        raise IndexError(f"{OP}: an id or slot was out of range on {device}; its row was read as zeros")


def _flag(device: torch.device) -> Tensor:
    """Where the kernels on one device leave the mark of an index out of range."""
    if device.index not in _flags:
        _flags[device.index] = torch.zeros(1, dtype=torch.int32, device=device)
    return _flags[device.index]


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
