"""Shared by the kernels: the launch, and the tiles of a row."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Left to itself, ptxas keeps a register in memory where one more block fits on a multiprocessor then. (HIP has no such
# option.)
REGISTERS = {} if torch.version.hip else {"maxnreg": 128}
WIDE = {torch.float64: tl.float64}  # in what a dtype is added up; everything else in float32


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on `device`, on torch's current stream there. Every launch goes through here."""
    index = device.index  # None on the CPU
    if index is None or index == torch.cuda.current_device():  # asking takes less than changing to where one is
        kernel.run(*arguments, grid=grid, warmup=False, **constants, **REGISTERS)
        return
    with torch.cuda.device(index):
        kernel.run(*arguments, grid=grid, warmup=False, **constants, **REGISTERS)


def wide(dtype: torch.dtype) -> Any:
    """Triton's name of the dtype in which values of `dtype` are added up."""
    return WIDE.get(dtype, tl.float32)


def over(length: int, size: int) -> int:
    """How many pieces of `size` cover `length`. (Triton's own function takes as long as a launch.)"""
    return -(-length // size)


def power_of_two(number: int) -> int:
    """The least one that is not below `number`."""
    return 1 << (number - 1).bit_length()


@functools.lru_cache(1024)
def columns(dim: int, most: int) -> int:
    """The columns of a tile, for rows of `dim` elements: a power of two of at most `most`.

    The one with the fewest columns beyond the last, and of these the largest: 256 for a row of 768.
    """
    least = power_of_two(dim)
    sizes = [size for size in (1024, 512, 256, 128) if size <= min(least, most)] or [least]
    return min(sizes, key=lambda size: (over(dim, size) * size, -size))


def pointer(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """`tensor`, or where there is none some other one, which the kernel does not read."""
    return instead if tensor is None else tensor


@triton.jit
def complain(flag: tl.tensor, bad: tl.tensor) -> None:
    """Leave a mark where an index is bad: every writer writes the same value."""
    tl.store(flag + tl.where(bad, 0, 0), 1, mask=bad)


@triton.jit
def folded(x: tl.tensor) -> tl.tensor:
    """The sums of eight neighbours of a tile, which one thread has: fewer accumulators are kept."""
    FOLD: tl.constexpr = min(8, x.numel)
    return tl.sum(tl.reshape(x, [x.numel // FOLD, FOLD]), axis=1)
