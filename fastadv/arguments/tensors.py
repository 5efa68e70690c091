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


def is_aligned(tensor: Tensor) -> bool:
    """Whether each element lies at a multiple of its size, as those of a buffer that is cut anywhere may not."""
    return tensor.data_ptr() % tensor.element_size() == 0


def adjacent(tensor: Tensor) -> bool:
    """Whether each row of a matrix is in one piece; rows may be apart, or all the same."""
    return tensor.shape[1] <= 1 or tensor.stride(1) == 1 or tensor.shape[0] == 0


def disjoint(tensor: Tensor) -> bool:
    """Whether no two rows of a matrix share memory."""
    return tensor.shape[0] <= 1 or tensor.shape[1] == 0 or tensor.stride(0) >= tensor.shape[1]


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two plain tensors lie over one another; columns of one matrix, side by side, do not."""
    if one.numel() == 0 or other.numel() == 0:
        return False
    (low, end), (other_low, other_end) = _extent(one), _extent(other)
    return low < other_end and other_low < end and not _side_by_side(one, other)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The address of the first element, and that behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _side_by_side(one: Tensor, other: Tensor) -> bool:
    if one.dim() != 2 or other.dim() != 2 or not adjacent(one) or not adjacent(other):
        return False
    left, right = sorted((one, other), key=Tensor.data_ptr)
    row = left.stride(0) * left.element_size()
    if row == 0 or row != right.stride(0) * right.element_size():
        return False
    gap = (right.data_ptr() - left.data_ptr()) % row
    return gap >= left.shape[1] * left.element_size() and gap + right.shape[1] * right.element_size() <= row


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
