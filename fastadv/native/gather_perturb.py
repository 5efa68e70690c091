"""The launcher of csrc/gather_perturb: every check, the output's allocation, then addresses."""

from __future__ import annotations

import torch
from torch import Tensor

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
        slot: int64, of the shape of `ids`: which row of `delta` each position takes, -1: none; or None.

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
    _check_weight(weight)
    ids = _check_indices("ids", ids, weight.device)
    slot = _check_slot(slot, ids, delta)
    if delta is not None:
        _check_delta(delta, weight, ids, slot)
    out = weight.new_empty((*ids.shape, weight.shape[1]))
    call = extension.GatherPerturbCall(
        checks.dtype_code(OP, "weight", weight),
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


def _check_weight(weight: Tensor) -> None:
    checks.dtype_code(OP, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{OP}: weight must be a table [V, D], but has shape {tuple(weight.shape)}")
    if weight.shape[1] > 1 and weight.stride(1) != 1:
        raise ValueError(
            f"{OP}: the elements of a row of weight must be adjacent (inner stride 1), but the strides are "
            f"{weight.stride()}; pass weight.contiguous()"
        )


def _check_indices(name: str, indices: Tensor, device: torch.device) -> Tensor:
    checks.same_device(OP, name, indices, device)
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{OP}: {name} must be int64 or int32, but is {indices.dtype}")
    if indices.dtype == torch.int64 and indices.is_contiguous():
        return indices
    # A copy does no harm here: indices are small, and only read.
    return indices.to(torch.int64).contiguous()


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
