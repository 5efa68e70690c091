"""Rows of a table that are somewhere else for a while, in place, and then back where they were."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.ops import rows as ops


class MovedTable:
    """Rows (None: all) of one table, and how far they are to move.

    Rows that an optimizer has trained in between keep what it did: `value` is taken off them.
    """

    def __init__(self, table: Tensor, value: Tensor, rows: Tensor | None) -> None:
        self.table, self.value, self.rows = table, value, rows
        self._before: Tensor | None = None
        self._moved: Tensor | None = None
        self._back: Tensor | None = None  # where to put them, where that is known: `put_back` may be called twice

    def move(self) -> None:
        """Move them."""
        before = ops.back_up(self.table, self.rows)
        moved = (before.to(self.value.dtype) + self.value).to(self.table.dtype)
        self._before, self._moved, self._back = before, moved, before  # there, should the move itself fail
        self._put(moved)
        self._back = None

    def put_back(self) -> None:
        """Put them back, bit for bit."""
        before, moved = self._before, self._moved
        if before is None or moved is None:
            return
        if self._back is None:
            now = ops.back_up(self.table, self.rows)
            trained = (now.to(self.value.dtype) - self.value).to(self.table.dtype)
            self._back = torch.where((now == moved).all(dim=1, keepdim=True), before, trained)
        self._put(self._back)
        self._before = self._moved = None

    def _put(self, values: Tensor) -> None:
        ops.restore(self.table, values, self.rows)
        torch.clear_autocast_cache()  # it keeps casts by tensor, and does not see that one was written to
