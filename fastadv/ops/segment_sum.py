r"""Sum the rows of equal ids: the gradient of a table's touched rows.

.. math:: out_s = \sum_{i:\, slot_i = s} values_i

One sort per batch (`segments`) serves every step on that batch. Rows are summed in the order of their position, in
float32 (float64 for float64), so the result repeats bit for bit. Nothing is read back from the device: there is room
for `min(N, V)` rows, and those beyond the number of distinct ids are zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv import native
from fastadv.arguments.segments import Segments, check_vocabulary
from fastadv.arguments.signatures import SEGMENTS
from fastadv.native.launch import fitted
from fastadv.native.segment_sum import segment_sum as native_segment_sum
from fastadv.native.segment_sum import segments as native_segments
from fastadv.ops.dispatch import Backend, Op, triton

PLAN = "segments"
SUM = "segment_sum"


def eager_segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> Segments:
    """The plan in plain PyTorch: one stable sort, and no number that the host has to know."""
    SEGMENTS.check_shapes((ids, mask))
    return _plan(ids, mask, vocabulary)


def segments_on_cuda(ids: Tensor, mask: Tensor | None, vocabulary: int) -> Segments:
    """The same for plain memory. A sort is a sort: on CUDA PyTorch's is the fast one."""
    ids, mask = fitted(SEGMENTS, (ids, mask))
    return _plan(ids, mask, vocabulary)


def _plan(ids: Tensor, mask: Tensor | None, vocabulary: int) -> Segments:
    """On a GPU every call costs the host more than the device, so that there are as few as will do."""
    check_vocabulary(vocabulary)
    _check_ids(ids, vocabulary)
    count, rows = ids.shape[0], min(ids.shape[0], vocabulary)
    ids, masked = ids.to(torch.int64), None if mask is None else ~mask
    key, order = torch.sort(ids if masked is None else torch.add(masked, ids, alpha=2), stable=True)
    by_id = key if masked is None else key >> 1
    ends = torch.searchsorted(by_id, by_id, right=True)  # where the segment of each position ends
    row = ends.new_zeros(count + 1).scatter_(0, ends, 1).cumsum(0)[:count]  # how many have ended before it
    slot = torch.empty_like(order).scatter_(0, order, row)
    starts = torch.searchsorted(row, torch.arange(rows + 1, device=ids.device))
    if masked is None:
        return Segments(slot, order, starts, starts[1:].clone())
    stops = torch.searchsorted(torch.add(key & 1, row, alpha=2), torch.arange(1, 2 * rows + 1, 2, device=ids.device))
    return Segments(slot.masked_fill_(masked, -1), order, starts, stops)


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    """On the CPU an id outside the table is an error; on CUDA looking would be a sync."""
    if ids.device.type != "cpu" or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise IndexError(f"{PLAN}: id {low if low < 0 else high} is out of range for a table of {vocabulary} rows")


def fake_segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan's shapes and dtypes."""
    count, rows = ids.shape[0], torch.sym_min(ids.shape[0], vocabulary)  # type: ignore[no-untyped-call]
    slot, order, starts, stops = (ids.new_empty(size, dtype=torch.int64) for size in (count, count, rows + 1, rows))
    return slot, order, starts, stops


def eager(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """The sum in plain PyTorch: embedding bags, which sum in a fixed order on every device.

    Two bags per segment, what counts and what is masked, so that a NaN in a masked position stays out of the sum.
    """
    rows, wide = stops.shape[0], values.to(torch.promote_types(values.dtype, torch.float32))
    if wide.numel() == 0 or rows == 0:
        return wide.new_zeros((rows, *values.shape[1:]))
    offsets = torch.stack([starts[:rows], stops], dim=1).flatten()
    bags = F.embedding_bag(order, wide, offsets, mode="sum")
    return bags.view(rows, 2, -1)[:, 0].contiguous()


def fake(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """The sum's shape and dtype."""
    wide = torch.promote_types(values.dtype, torch.float32)
    return values.new_empty((stops.shape[0], *values.shape[1:]), dtype=wide)


PLAN_OP = Op(
    PLAN,
    "(Tensor ids, Tensor? mask, int vocabulary) -> (Tensor slot, Tensor order, Tensor starts, Tensor stops)",
    eager=eager_segments,
    fake=fake_segments,
    backends=[
        Backend("C++", "cpu", native_segments, native.reason),
        Backend("PyTorch", "cuda", segments_on_cuda),
    ],
)
OP = Op(
    SUM,
    "(Tensor values, Tensor order, Tensor starts, Tensor stops) -> Tensor",
    eager=eager,
    fake=fake,
    backends=[Backend("C++", "cpu", native_segment_sum, native.reason), triton("segment_sum")],
)


def segments(ids: Tensor, vocabulary: int, *, mask: Tensor | None = None, fused: bool | None = None) -> Segments:
    """Group equal `ids` [N] of a table of `vocabulary` rows; `mask` [N] is True where a position counts.

    `ids` and `mask` of any other shape are flattened. Everything returned is int64.

    Raises:
        TypeError: ids that are not int64 or int32, or a mask that is not bool.
        ValueError: a mask of another shape than `ids`, or a vocabulary below zero.
        IndexError: an id outside the table (on the CPU).

    Examples:
        >>> segments(torch.tensor([7, 3, 7, 7]), 10, mask=torch.tensor([False, True, True, True]))
        Segments(slot=tensor([-1,  0,  1,  1]), order=tensor([1, 2, 3, 0]), starts=tensor([0, 1, 4, 4, 4]), \
stops=tensor([1, 3, 4, 4]))
    """
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"{PLAN}: mask has shape {tuple(mask.shape)}, but ids has {tuple(ids.shape)}")
    if ids.dim() != 1:
        ids, mask = ids.reshape(-1), None if mask is None else mask.reshape(-1)
    found: Segments = PLAN_OP.on(ids, fused)(ids, mask, vocabulary)
    return found


def segment_sum(values: Tensor, groups: Segments, *, fused: bool | None = None) -> Tensor:
    """Sum `values` [N, D] over the positions of equal ids that are not masked -> [rows, D].

    `values` may be float32, bfloat16 or float16, summed in float32, or float64. The result is in the dtype of the sum.
    A `values` of more dimensions, such as [B, T, D], is flattened.

    Raises:
        TypeError: values that are not floating.
        ValueError: `groups` of another number of positions.

    Examples:
        >>> groups = segments(torch.tensor([7, 3, 7]), 10)
        >>> segment_sum(torch.tensor([[1.0], [2.0], [4.0]]), groups)
        tensor([[2.],
                [5.],
                [0.]])
    """
    out: Tensor = OP.on(values, fused)(rows_of(values), groups.order, groups.starts, groups.stops)
    return out


def rows_of(values: Tensor) -> Tensor:
    """`values` as [N, D]."""
    return values if values.dim() == 2 else values.reshape(-1, values.shape[-1])
