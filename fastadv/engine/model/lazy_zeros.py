"""Zeros that take up memory as they are written to."""

from __future__ import annotations

import mmap
import sys

import torch
from torch import Tensor

LEAST = 1 << 22  # bytes; below, a mapping is not worth its system calls


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of the shape and dtype of `tensor`.

    A step writes some hundred rows of a table's gradient. `torch.zeros` writes all of it first, page by page; fresh
    private memory of the system's is zero already, and its pages come with the first write.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < LEAST or not tensor.is_contiguous() or sys.platform == "win32":
        return torch.zeros_like(tensor)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
