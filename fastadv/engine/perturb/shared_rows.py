"""The rows of a table that the batches of several ranks touch: every rank holds the perturbation of all of them.

Only touched rows are sent, never the table: their ids once per step, and the sums of their gradients once per ascent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.perturb.ranks import Meeting
from fastadv.ops import Segments, segment_sum, segments


class SharedRows:
    """One step's. Sums are taken in the order of the ranks, so that all of them have the same rows to the bit.

    Args:
        meeting: of the ranks.
        own: where equal ids lie in this rank's batch.
        ids: that `own` is of, [N].
        vocabulary: how many ids there may be.
        like: a tensor [..., D] with the perturbation's dtype and device.
        fused: which backend sums.

    Attributes:
        rows: r [U, D], one row per id that some rank's batch has; zero at first.
        occupied: [U], whether an id is at a position that no mask leaves out, on any rank.
    """

    def __init__(
        self, meeting: Meeting, own: Segments, ids: Tensor, vocabulary: int, like: Tensor, fused: bool | None
    ) -> None:
        self._meeting, self._fused = meeting, fused
        self._counts = [count for (count,) in meeting.tell(len(own.stops))]
        first = own.starts[:-1].clamp(max=max(len(ids) - 1, 0))  # on a GPU there are empty segments at the end
        distinct = ids[own.order[first]] if len(ids) else ids
        every = self._every(torch.stack([distinct, (own.stops > own.starts[:-1]).to(ids.dtype)], dim=1))
        self._plan = segments(every[:, 0].contiguous(), vocabulary, fused=fused).trimmed()
        self.rows = like.new_zeros(len(self._plan.stops), like.shape[-1])
        self.occupied = segment_sum(every[:, 1:].to(like.dtype), self._plan, fused=fused).flatten() > 0
        before = sum(self._counts[: meeting.ranks.rank])
        self._mine = self._plan.slot[before : before + self._counts[meeting.ranks.rank]]

    def summed(self, own: Tensor) -> Tensor:
        """[U, D]: over all ranks, what each has of its own rows [R, D]."""
        return segment_sum(self._every(own), self._plan, fused=self._fused)

    def mine(self) -> Tensor:
        """[R, D]: r of this rank's ids."""
        return self.rows[self._mine]

    def _every(self, own: Tensor) -> Tensor:
        """All ranks' rows, one rank after the other."""
        room = own.new_zeros(max(self._counts), *own.shape[1:])
        room[: len(own)] = own
        parts = self._meeting.gather(room)
        return torch.cat([part[:count] for part, count in zip(parts, self._counts, strict=True)])
