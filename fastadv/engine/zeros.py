"""Zeros that the system makes, in large pages."""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch
from torch import Tensor

LEAST = 1 << 22  # bytes; below, a mapping is not worth its system calls


def zeros_like(tensor: Tensor) -> Tensor:
    """Zeros of the shape and dtype of `tensor`.

    A step writes some hundred rows of a table's gradient, and the optimizer reads it all. `torch.zeros` writes all of
    it first, and the system brings a page of 4 KB for every few rows. Fresh private memory is zero already, its pages
    come with the first write, and where they may be large there are few of them.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < LEAST or not tensor.is_contiguous() or sys.platform == "win32":
        return torch.zeros_like(tensor)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
