"""Where equal ids lie in a batch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Segment s, the s-th smallest distinct id, is at `order[starts[s]:starts[s + 1]]`."""

    slot: Tensor  # [N] the segment of a position, -1 where it is masked
    order: Tensor  # [N] positions by (id, masked, position)
    starts: Tensor  # [rows + 1], N for segments beyond the last id
    stops: Tensor  # [rows] where the masked positions of a segment begin

    def trimmed(self) -> Segments:
        """Without the room that no id takes; only on the CPU, where looking costs nothing."""
        slot, order, starts, stops = self
        if not starts.is_cpu:
            return self
        rows = int(torch.searchsorted(starts, order.shape[0]))  # starts rise to N, and stay there
        if rows == stops.shape[0]:
            return self
        return Segments(slot, order, starts.narrow(0, 0, rows + 1), stops.narrow(0, 0, rows))
