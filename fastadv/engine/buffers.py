"""Memory that serves from step to step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastadv.engine.lookup import Lookup


class Buffers:
    """The engine's, lent to each step: the lookups' deltas and moments, those of table scopes, the skipped groups.

    Attributes:
        under_at: whether the last step's lookups are sites, each for all forwards under `at(mask)`.
    """

    def __init__(self) -> None:
        self.lookups: list[Lookup] = []
        self.under_at = False
        self.rows, self.scratch, self.moments = Rows(), Rows(), Rows()
        self.skipped = torch.zeros((), dtype=torch.int64, device="cpu")

    def skipped_on(self, device: torch.device) -> Tensor:
        """The count, on the device where it grows."""
        if self.skipped.device != device:
            self.skipped = self.skipped.to(device, non_blocking=True)
        return self.skipped

    def remember(self) -> Callable[[], None]:
        """Return what takes the count back to here, should the step fail."""
        skipped = self.skipped.clone()

        def put_back() -> None:
            self.skipped.copy_(skipped)

        return put_back

    def memory(self) -> list[Tensor]:
        """Every tensor that a captured graph must keep."""
        lent = [one for lookup in self.lookups for one in (lookup.scratch, lookup.moments) if one is not None]
        deltas = [lookup.delta for lookup in self.lookups]
        return [*deltas, *lent, self.skipped, self.rows.memory, self.scratch.memory, self.moments.memory]


class Rows:
    """Memory for [R, D], as many rows as a batch happens to need."""

    def __init__(self) -> None:
        self.memory = self._last = torch.empty(0, device="cpu")

    def of(self, count: int, like: Tensor) -> Tensor:
        """[count, D] in the dtype and on the device of `like` [..., D]; not initialised. It may be the last one."""
        dim, memory, last = like.shape[-1], self.memory, self._last
        if last.shape == (count, dim) and last.dtype == like.dtype and last.device == like.device:
            return last
        if memory.dtype != like.dtype or memory.device != like.device or memory.numel() < count * dim:
            self.memory = like.new_empty(count * dim * 5 // 4)  # the next batch may have some more
        self._last = self.memory[: count * dim].view(count, dim)
        return self._last
