r"""Sum the rows of equal ids: the gradient of a table's touched rows.

.. math:: out_s = \sum_{i:\, slot_i = s} values_i

One sort per batch (`segments`) serves every step on that batch. Rows are summed in the order of their position, in
float32 (float64 for float64), so the result repeats bit for bit. Nothing is read back from the device: there is room
for `min(N, V)` rows, and those beyond the number of distinct ids are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.ops.dispatch import Op


class Segments(NamedTuple):
    """Where equal ids lie: `slot` [N] the row of each position, `order` [N] positions by row, `starts` [rows + 1]."""

    slot: Tensor
    order: Tensor
    starts: Tensor


def segments(ids: Tensor, vocabulary: int) -> Segments:
    """Group equal `ids` [N] of a table of `vocabulary` rows."""
    by_id, order = torch.sort(ids.reshape(-1), stable=True)
    first = torch.ones_like(by_id)
    first[1:] = by_id[1:] != by_id[:-1]
    row = first.cumsum(0) - 1
    slot = torch.empty_like(order).scatter_(0, order, row)
    bounds = torch.arange(min(len(by_id), vocabulary) + 1, device=ids.device)
    return Segments(slot, order, torch.searchsorted(row, bounds))


def eager(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The op in plain PyTorch: an embedding bag per segment, which sums in a fixed order on every device."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    if wide.numel() == 0:
        return values.new_zeros((starts.shape[0] - 1, *values.shape[1:]))
    return F.embedding_bag(order, wide, starts[:-1], mode="sum").to(values.dtype)


def fake(values: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """The op's shape and dtype."""
    return values.new_empty((starts.shape[0] - 1, *values.shape[1:]))


OP = Op(
    "segment_sum",
    "(Tensor values, Tensor order, Tensor starts) -> Tensor",
    eager=eager,
    fake=fake,
)


def segment_sum(values: Tensor, groups: Segments, *, fused: bool | None = None) -> Tensor:
    """Sum `values` [N, D] over the positions of equal ids -> [rows, D]."""
    out: Tensor = OP.choose(values.device.type, fused)(values, groups.order, groups.starts)
    return out
