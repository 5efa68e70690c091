"""Dtypes, strides and memory: what the checks of `signature` are made of."""

from __future__ import annotations

import torch
from torch import Tensor

# csrc/common.h and csrc/tensors.h have the same order.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
FLOATS = DTYPES[:4]
CODES = {dtype: code for code, dtype in enumerate(FLOATS)}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what values of `dtype` are computed: float64 in float64, everything else in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor has plain memory of its own: not if it is sharded, sparse, meta or lazily negated."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_neg():
        return False
    try:
        return tensor.data_ptr() != 0 or tensor.numel() == 0
    except RuntimeError:  # a wrapper around other tensors, as functorch has them
        return False


def adjacent(tensor: Tensor) -> bool:
    """Whether each row of a matrix is in one piece; rows may be apart, or all the same."""
    return tensor.shape[1] <= 1 or tensor.stride(1) == 1


def disjoint(tensor: Tensor) -> bool:
    """Whether no two rows of a matrix share memory."""
    return tensor.shape[0] <= 1 or tensor.stride(0) >= tensor.shape[1]


def row_stride(tensor: Tensor) -> int | None:
    """The distance from row to row of [..., D], if it is always the same and elements are adjacent; None if not."""
    if tensor.is_contiguous():
        return tensor.shape[-1]
    if tensor.stride(-1) != 1:
        return None
    stride, reach = 0, None
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if reach is None:
            stride, reach = step, step
        if step != reach:
            return None
        reach *= size
    return stride
