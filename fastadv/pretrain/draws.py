"""Random starts by row: a row's numbers are the same in any batch, on any of any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

GOLDEN, MIX, AGAIN = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's
BITS = (1 << 64) - 1


class ByRow:
    """Draws of one micro-batch, each row's from a generator that (seed, step, row) seeds.

    Dropout is not drawn here: it alone depends on which process has a row.

    Args:
        seed: of the training.
        step: the optimizer step.
        rows: the rows' numbers in the whole training.

    Examples:
        >>> import torch
        >>> both = ByRow(0, 3, [7, 8]).uniform((2, 4), torch.device("cpu"))
        >>> torch.equal(both[1:], ByRow(0, 3, [8]).uniform((1, 4), torch.device("cpu")))
        True
    """

    def __init__(self, seed: int, step: int, rows: Sequence[int]) -> None:
        self._keys = [key(seed, step, row) for row in rows]
        self._draws = 0

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """U(0, 1), float32, [rows, ...]."""
        return self._drawn(torch.Tensor.uniform_, shape, device)

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """N(0, 1), float32, [rows, ...]."""
        return self._drawn(torch.Tensor.normal_, shape, device)

    def _drawn(self, fill: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device) -> Tensor:
        if shape[0] != len(self._keys):
            raise ValueError(f"a start of shape {shape} has no row for each of the batch's {len(self._keys)}")
        drawn = torch.empty(shape, dtype=torch.float32, device=device)
        generator = torch.Generator(device)
        for row, one in zip(drawn, self._keys, strict=True):
            generator.manual_seed(key(one, self._draws) >> 1)
            fill(row, generator=generator)
        self._draws += 1
        return drawn


def key(*numbers: int) -> int:
    """Mix numbers into one of 64 bits (SplitMix64, Steele et al. 2014), so that near ones are far apart."""
    mixed = 0
    for number in numbers:
        mixed = (mixed ^ number) + GOLDEN & BITS
        mixed = (mixed ^ (mixed >> 30)) * MIX & BITS
        mixed = (mixed ^ (mixed >> 27)) * AGAIN & BITS
        mixed ^= mixed >> 31
    return mixed
