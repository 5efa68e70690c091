"""The positions of equal ids in a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def check_vocabulary(vocabulary: int) -> None:
    """Raises ValueError for a table of less than no rows."""
    if vocabulary < 0:
        raise ValueError(f"segments: vocabulary is the number of rows of the table, and cannot be {vocabulary}")


class Segments(NamedTuple):
    """`order[starts[s]:starts[s + 1]]` are the positions of segment s, the s-th smallest distinct id."""

    slot: Tensor  # [N] the segment of a position, -1 where it is masked
    order: Tensor  # [N] positions by (id, masked, position)
    starts: Tensor  # [rows + 1], N for segments beyond the last id
    stops: Tensor  # [rows] where the masked positions of a segment begin

    def trimmed(self) -> Segments:
        """Drop the empty segments at the end; on a GPU their number would be a sync, and they stay."""
        slot, order, starts, stops = self
        if not starts.is_cpu:
            return self
        rows = int(torch.searchsorted(starts, order.shape[0]))  # starts rise to N, and stay there
        if rows == stops.shape[0]:
            return self
        return Segments(slot, order, starts.narrow(0, 0, rows + 1), stops.narrow(0, 0, rows))
