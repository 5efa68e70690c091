"""Groups of rows that follow one another, as many in each as there happen to be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Runs(NamedTuple):
    """Rows `starts[g]` to `starts[g + 1]` are group g; on a GPU more groups may follow, without a row."""

    starts: Tensor  # [G + 1] int64, from 0 to N
    of: Tensor  # [N] int64, the group of each row

    @staticmethod
    def begin_at(starts: Tensor, rows: int) -> Runs:
        """The groups that begin at these of so many rows.

        Raises:
            TypeError: they are not int64.
            ValueError: the starts do not rise from 0 to `rows` (looked at on the CPU).
        """
        if starts.dtype != torch.int64:
            raise TypeError(f"ascend: starts must be int64, but is {starts.dtype}")
        if starts.is_cpu and (starts[[0, -1]].tolist() != [0, rows] or bool((starts.diff() < 0).any())):
            raise ValueError(f"ascend: starts must rise from 0 to the number of positions, {rows}: {starts.tolist()}")
        of = torch.searchsorted(starts, torch.arange(rows, device=starts.device), right=True) - 1
        return Runs(starts, of)

    def occupied(self) -> int:
        """How many have a row. Waits for the device."""
        return int(self.of[-1]) + 1 if len(self.of) else 0

    def each(self, values: Tensor, reduce: str) -> Tensor:
        """The sum ("sum") or largest ("max") of each group's rows [N]: [G], 0 where there is no row."""
        return torch.segment_reduce(values, reduce, offsets=self.starts, initial=0, unsafe=True)

    def spread(self, values: Tensor, reduce: str) -> Tensor:
        """`each`, at every row of the group: [N]."""
        return self.each(values, reduce)[self.of]

    def firsts(self, values: Tensor) -> Tensor:
        """The value [N] at each group's first row: [G], 0 where there is none."""
        first = values[self.starts[:-1].clamp(max=max(len(values) - 1, 0))]
        return first.masked_fill(self.starts[1:] == self.starts[:-1], 0)
