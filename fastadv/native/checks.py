"""Checks that launchers share. An address says nothing about what it points to, so these come first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv import native

# csrc/common.h has the same codes.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def extension_for(op: str, tensor: Tensor) -> Any:
    """The extension, if it has `op` for the device `tensor` is on.

    Raises:
        RuntimeError: it has not; the message says why.
    """
    device = tensor.device.type
    if device == "cpu":
        return native.extension()
    why = native.cuda_reason() if device == "cuda" else "only cpu and cuda tensors are served"
    if why is not None:
        raise RuntimeError(f"{op}: no native backend for {device}: {why}")
    return native.extension()


def extension_on_cpu(op: str, tensor: Tensor) -> Any:
    """The extension, for an op that it has for the CPU alone: on a GPU Triton runs it.

    Raises:
        RuntimeError: `tensor` is elsewhere, or the extension is not there.
    """
    if tensor.device.type != "cpu":
        raise RuntimeError(f"{op}: the C++ op is for the CPU alone, and a tensor is on {tensor.device}")
    return native.extension()


def dtype_code(op: str, name: str, tensor: Tensor) -> int:
    """The code of the tensor's dtype.

    Raises:
        TypeError: a dtype that the extension does not compute in.
    """
    code = DTYPES.get(tensor.dtype)
    if code is None:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{op}: {name} is {tensor.dtype}, but must be one of {served}")
    return code


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what values of `dtype` are computed: float64 in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def goes_with(op: str, name: str, tensor: Tensor, delta: Tensor) -> None:
    """Raises TypeError unless the extension computes with `tensor` in the dtype of `delta`."""
    dtype_code(op, name, tensor)
    if compute_dtype(tensor.dtype) != delta.dtype:
        raise TypeError(f"{op}: {name} is {tensor.dtype}, which does not go with a delta of {delta.dtype}")


def same_device(op: str, name: str, tensor: Tensor, device: torch.device, other: str = "the table") -> None:
    """Raises ValueError if `tensor` is elsewhere than `other`, which is on `device`."""
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, but {other} is on {device}")


def contiguous(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError if `tensor` has gaps or another order."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, but has shape {tuple(tensor.shape)} and strides "
            f"{tensor.stride()}; pass {name}.contiguous()"
        )


def rows(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless `tensor` is [N, D] with each row in one piece; rows may be apart, or all the same."""
    if tensor.dim() != 2:
        raise ValueError(f"{op}: {name} must be [N, D], but has shape {tuple(tensor.shape)}")
    adjacent(op, name, tensor)


def adjacent(op: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError unless the elements of each row of `tensor`, which has two dimensions, lie side by side."""
    if tensor.shape[1] > 1 and tensor.stride(1) != 1:
        raise ValueError(
            f"{op}: the elements of a row of {name} must be adjacent (inner stride 1), but the strides are "
            f"{tensor.stride()}; pass {name}.contiguous()"
        )


def plan(op: str, name: str, tensor: Tensor, count: int | None, device: torch.device) -> None:
    """Raises unless `tensor` is one of the int64 tensors that `segments` returns, with `count` entries if given."""
    same_device(op, name, tensor, device)
    if tensor.dtype != torch.int64:
        raise TypeError(f"{op}: {name} must be int64, but is {tensor.dtype}")
    if tensor.dim() != 1 or (count is not None and tensor.shape[0] != count):
        wanted = "[N]" if count is None else f"[{count}]"
        raise ValueError(f"{op}: {name} must be {wanted}, but has shape {tuple(tensor.shape)}")
    contiguous(op, name, tensor)


def indices(op: str, name: str, tensor: Tensor) -> Tensor:
    """Indices as int64 in one piece: themselves, or a copy, which does no harm: they are small, and only read.

    Raises:
        TypeError: they are neither int64 nor int32.
    """
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: {name} must be int64 or int32, but is {tensor.dtype}")
    return tensor if tensor.dtype == torch.int64 and tensor.is_contiguous() else tensor.to(torch.int64).contiguous()


def address(op: str, name: str, tensor: Tensor) -> int:
    """Where the tensor's first element is.

    Raises:
        TypeError: there is no plain memory behind it (a sharded, sparse, meta or lazily negated tensor).
    """
    plain = tensor.layout == torch.strided and not tensor.is_neg()
    pointer = tensor.data_ptr() if plain else 0
    if pointer == 0 and (not plain or tensor.numel() > 0):
        raise TypeError(f"{op}: {name} is a {type(tensor).__name__} with no plain memory of its own")
    return pointer
