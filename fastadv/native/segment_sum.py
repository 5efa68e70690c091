"""The launchers of csrc/segment_sum: every check, the outputs' allocation, then addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.native import checks

PLAN = "segments"
SUM = "segment_sum"


def segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort positions by (id, masked, position), on the CPU.

    Nothing is mutated.

    Args:
        ids: [N], int64 or int32.
        mask: [N] bool, True where a position counts; or None: all do.
        vocabulary: how many rows the table has.

    Returns:
        `slot` [N], `order` [N], `starts` [rows + 1] and `stops` [rows], int64, with `rows = min(N, vocabulary)`:
        see `fastadv.ops.segment_sum.Segments`.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape or device that does not fit, or a vocabulary below zero.
        IndexError: an id outside the table.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Example:
        >>> slot, order, starts, stops = segments(torch.tensor([7, 3, 7]), torch.tensor([False, True, True]), 10)
        >>> slot, order, starts, stops
        (tensor([-1,  0,  1]), tensor([1, 2, 0]), tensor([0, 1, 3, 3]), tensor([1, 2, 3]))
    """
    extension = checks.extension_on_cpu(PLAN, ids)
    ids = _check_ids(ids)
    mask = _check_mask(mask, ids)
    if vocabulary < 0:
        raise ValueError(f"{PLAN}: vocabulary is the number of rows of the table, and cannot be {vocabulary}")
    count = ids.shape[0]
    rows = min(count, vocabulary)
    slot, order, starts, stops = (ids.new_empty(size) for size in (count, count, rows + 1, rows))
    call = extension.SegmentsCall(
        checks.address(PLAN, "ids", ids),
        0 if mask is None else checks.address(PLAN, "mask", mask),
        vocabulary,
        count,
        slot.data_ptr(),
        order.data_ptr(),
        starts.data_ptr(),
        stops.data_ptr(),
        rows,
    )
    extension.segments_cpu(call)
    return slot, order, starts, stops


def segment_sum(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    r"""Sum rows of values by segment, in the order of positions.

    .. math:: out_s = \sum_{i = starts_s}^{stops_s - 1} values[order_i]

    Nothing is mutated.

    Args:
        values: [N, D], float32, float64, bfloat16 or float16; rows may be strided or expanded, elements of a row not.
        order: [N] int64, contiguous.
        starts: [rows] or more int64, contiguous; only the first `rows` are used.
        stops: [rows] int64, contiguous.

    Returns:
        [rows, D] in float32 (float64 for float64), contiguous.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit.
        IndexError: a position or segment outside `values`; nothing has been written then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Example:
        >>> values, order = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 0, 2])
        >>> segment_sum(values, order, torch.tensor([0, 1]), torch.tensor([1, 3]))
        tensor([[2.],
                [5.]])
    """
    extension = checks.extension_on_cpu(SUM, values)
    out = check(values, order, starts, stops)
    call = extension.SegmentSumCall(
        checks.DTYPES[values.dtype],
        checks.address(SUM, "values", values),
        values.stride(0),
        values.shape[0],
        checks.address(SUM, "order", order),
        checks.address(SUM, "starts", starts),
        checks.address(SUM, "stops", stops),
        out.data_ptr(),
        *out.shape,
    )
    extension.segment_sum_cpu(call, torch.get_num_threads())
    return out


def check(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """Room for the result [rows, D], if everything is as `segment_sum` says.

    Raises:
        TypeError, ValueError: as `segment_sum` does.
    """
    checks.dtype_code(SUM, "values", values)
    checks.address(SUM, "values", values)
    checks.rows(SUM, "values", values)
    checks.plan(SUM, "order", order, values.shape[0], values.device)
    checks.plan(SUM, "stops", stops, None, values.device)
    checks.plan(SUM, "starts", starts, None, values.device)
    if starts.shape[0] < stops.shape[0]:
        raise ValueError(f"{SUM}: starts has {starts.shape[0]} entries, but stops has {stops.shape[0]}")
    return values.new_empty((stops.shape[0], values.shape[1]), dtype=checks.compute_dtype(values.dtype))


def _check_ids(ids: Tensor) -> Tensor:
    if ids.dim() != 1:
        raise ValueError(f"{PLAN}: ids must be [N], but has shape {tuple(ids.shape)}; pass ids.reshape(-1)")
    return checks.indices(PLAN, "ids", ids)


def _check_mask(mask: Tensor | None, ids: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if mask.device != ids.device:
        raise ValueError(f"{PLAN}: mask is on {mask.device}, but ids is on {ids.device}")
    if mask.dtype != torch.bool:
        raise TypeError(f"{PLAN}: mask must be bool, but is {mask.dtype}")
    if mask.shape != ids.shape:
        raise ValueError(f"{PLAN}: mask has shape {tuple(mask.shape)}, but ids has {tuple(ids.shape)}")
    return mask.contiguous()
