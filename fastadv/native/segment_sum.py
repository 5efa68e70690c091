"""The launchers of csrc/segment_sum: every check, the outputs' allocation, then addresses."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.native import checks


def segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Group equal ids; see `fastadv.ops.segment_sum` for what is returned.

    Args:
        ids: [N] int64 or int32, on the CPU.
        mask: [N] bool; None: nothing is masked.
        vocabulary: how many ids there are.

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit.
        IndexError: an id outside the vocabulary; nothing has been written then.
        RuntimeError: the extension is not there.
    """
    op = "segments"
    extension = checks.extension_for(op, ids)
    ids = checks.indices(op, "ids", ids, ids.device)
    if ids.dim() != 1 or vocabulary < 0:
        raise ValueError(f"{op}: ids must be [N], not {tuple(ids.shape)}, and vocabulary at least 0, not {vocabulary}")
    if mask is not None:
        checks.same_device(op, "mask", mask, ids.device)
        if mask.shape != ids.shape or mask.dtype != torch.bool:
            raise ValueError(f"{op}: mask must be bool of shape {tuple(ids.shape)}, not {mask.dtype} {tuple(mask.shape)}")
        mask = mask.contiguous()
    count = len(ids)
    rows = min(count, vocabulary)
    slot, order = torch.empty_like(ids), torch.empty_like(ids)
    starts, stops = ids.new_empty(rows + 1), ids.new_empty(rows)
    call = extension.SegmentsCall(
        checks.address(op, "ids", ids),
        0 if mask is None else checks.address(op, "mask", mask),
        count,
        vocabulary,
        slot.data_ptr(),
        order.data_ptr(),
        starts.data_ptr(),
        stops.data_ptr(),
        rows,
    )
    extension.segments_cpu(call)
    return slot, order, starts, stops


def segment_sum(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    r"""Sum the rows of every segment.

    .. math:: out_s = \sum_{i = starts_s}^{stops_s - 1} values[order_i]

    Args:
        values: [N, D], float32, float64, bfloat16 or float16; rows may be strided, elements of a row may not.
        order, starts, stops: [N], [S + 1] or [S], and [S], int64, as `segments` makes them.

    Returns:
        [S, D] float32, or float64 for float64.

    Raises:
        TypeError, ValueError: a dtype, shape, stride or device that does not fit.
        IndexError: an index that points outside; nothing has been read then (on the CPU).
        RuntimeError: the extension is not there for this device.
    """
    op = "segment_sum"
    extension = checks.extension_for(op, values)
    memory, code = checks.address(op, "values", values), checks.dtype_code(op, "values", values)
    checks.adjacent(op, "values", values)
    order, starts, stops = (
        checks.indices(op, name, tensor, values.device)
        for name, tensor in (("order", order), ("starts", starts), ("stops", stops))
    )
    count, dim = values.shape
    if order.shape != (count,) or stops.dim() != 1 or starts.dim() != 1 or len(starts) < len(stops):
        raise ValueError(
            f"{op}: for {count} values order must be [{count}], stops [S] and starts [S + 1], "
            f"not {tuple(order.shape)}, {tuple(stops.shape)} and {tuple(starts.shape)}"
        )
    out = values.new_empty((len(stops), dim), dtype=checks.compute_dtype(values.dtype))
    call = extension.SegmentSumCall(
        code,
        memory,
        values.stride(0),
        count,
        order.data_ptr(),
        starts.data_ptr(),
        stops.data_ptr(),
        out.data_ptr(),
        len(stops),
        dim,
    )
    extension.segment_sum_cpu(call, torch.get_num_threads())
    return out
