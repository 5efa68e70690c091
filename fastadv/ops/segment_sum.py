r"""Sum the rows of equal ids: the gradient of a table's touched rows.

.. math:: out_s = \sum_{i = starts_s}^{stops_s - 1} values[order_i]

One grouping per batch (`segments`) serves every step on that batch. Rows are summed in the order of their position, in
float32 (float64 for float64), so the result repeats bit for bit. Nothing is read back from the device: there is room
for `min(N, V)` rows, and those beyond the number of distinct ids are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv import native
from fastadv.native import segment_sum as launchers
from fastadv.ops.dispatch import Backend, Op


class Segments(NamedTuple):
    """Where equal ids lie. Positions are sorted by id, the masked ones of an id behind its others.

    Attributes:
        slot: [N], the segment that a position belongs to: the rank of its id; -1 where it is masked.
        order: [N], the positions, sorted.
        starts: [rows + 1]: segment s is order[starts[s]:starts[s + 1]].
        stops: [rows]: where the masked positions of a segment begin.
    """

    slot: Tensor
    order: Tensor
    starts: Tensor
    stops: Tensor


def eager_segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> Segments:
    """`segments` in plain PyTorch."""
    key = 2 * ids.long()
    by_key, order = torch.sort(key if mask is None else key + ~mask, stable=True)
    by_id, masked = by_key // 2, by_key % 2
    first = torch.ones_like(by_id)
    first[1:] = by_id[1:] != by_id[:-1]
    row = first.cumsum(0) - 1
    slot = torch.empty_like(order).scatter_(0, order, torch.where(masked > 0, -1, row))
    bounds = torch.arange(min(len(by_id), vocabulary) + 1, device=ids.device)
    starts = torch.searchsorted(row, bounds)
    stops = torch.searchsorted(2 * row + masked, 2 * bounds[:-1] + 1)
    return Segments(slot, order, starts, stops)


def fake_segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> Segments:  # noqa: ARG001
    """Its outputs' shapes."""
    count = ids.shape[0]
    rows = min(count, vocabulary)
    slot, order, starts, stops = (ids.new_empty(n, dtype=torch.int64) for n in (count, count, rows + 1, rows))
    return Segments(slot, order, starts, stops)


def eager(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """The op in plain PyTorch: an embedding bag per segment, which sums in a fixed order on every device."""
    wide = torch.promote_types(values.dtype, torch.float32)
    count, rows = len(order), len(stops)
    if rows == 0 or values.numel() == 0:
        return values.new_zeros((rows, values.shape[1]), dtype=wide)
    here = torch.arange(count, device=order.device)
    segment = torch.searchsorted(starts[:rows], here, right=True) - 1
    in_order = values.index_select(0, order).to(wide).masked_fill((here >= stops[segment]).unsqueeze(1), 0)
    return F.embedding_bag(here, in_order, starts[:rows], mode="sum")


def fake(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:  # noqa: ARG001
    """The op's shape and dtype."""
    return values.new_empty((stops.shape[0], values.shape[1]), dtype=torch.promote_types(values.dtype, torch.float32))


def _native(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    return launchers.segment_sum(with_adjacent_elements(values), order, starts, stops)


def with_adjacent_elements(table: Tensor) -> Tensor:
    """`table` [N, D], copied only if the elements of its rows lie apart (an expanded gradient's do)."""
    return table if table.shape[1] <= 1 or table.stride(1) == 1 else table.contiguous()


_reason = native.reason()
SEGMENTS = Op(
    "segments",
    "(Tensor ids, Tensor? mask, int vocabulary) -> (Tensor slot, Tensor order, Tensor starts, Tensor stops)",
    eager=eager_segments,
    fake=fake_segments,
    backends=[Backend("C++", "cpu", None if _reason else launchers.segments, _reason)],
    device_types=["cpu"],  # on CUDA torch's own sort serves
)
OP = Op(
    "segment_sum",
    "(Tensor values, Tensor order, Tensor starts, Tensor stops) -> Tensor",
    eager=eager,
    fake=fake,
    backends=[Backend("C++", "cpu", None if _reason else _native, _reason)],
)


def segments(ids: Tensor, vocabulary: int, *, mask: Tensor | None = None, fused: bool | None = None) -> Segments:
    """Group equal `ids` [N] of a table of `vocabulary` rows; `mask` [N] is true where a position counts.

    Raises:
        IndexError: an id outside the vocabulary (native).
    """
    on_cpu = ids.device.type == "cpu"
    return Segments(*SEGMENTS.choose(ids.device.type, fused if on_cpu else False)(ids, mask, vocabulary))


def segment_sum(values: Tensor, groups: Segments, *, fused: bool | None = None) -> Tensor:
    """Sum `values` [N, D] over the unmasked positions of equal ids -> [rows, D], float32 or float64."""
    run = OP.choose(values.device.type, fused)
    out: Tensor = run(values, groups.order, groups.starts, groups.stops)
    return out
