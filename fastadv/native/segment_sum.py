"""The launchers of csrc/segment_sum.h."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastadv.arguments import signatures
from fastadv.arguments.segments import Segments, check_vocabulary
from fastadv.native.launch import Launch


def _check(tensors: Sequence[Tensor | None], vocabulary: int) -> None:
    del tensors
    check_vocabulary(vocabulary)


_SEGMENTS = Launch("segments_cpu", signatures.SEGMENTS, _check)
_SUM = Launch("segment_sum_cpu", signatures.SEGMENT_SUM)


def segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> Segments:
    """Sort positions by (id, masked, position); there is room for `min(N, vocabulary)` segments.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape or device that does not fit, or a vocabulary below zero.
        IndexError: an id outside the table.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Examples:
        >>> slot, order, starts, stops = segments(torch.tensor([7, 3, 7]), torch.tensor([False, True, True]), 10)
        >>> slot, order, starts, stops
        (tensor([-1,  0,  1]), tensor([1, 2, 0]), tensor([0, 1, 3, 3]), tensor([1, 2, 3]))
    """
    return Segments._make(_SEGMENTS((ids, mask), vocabulary))


def segment_sum(values: Tensor, order: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    r"""Sum rows of values by segment, in the order of positions.

    .. math:: out_s = \sum_{i = starts_s}^{stops_s - 1} values[order_i]

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit.
        IndexError: a position or segment outside `values`; nothing has been written then.
        RuntimeError: the extension is not there, or the tensors are not on the CPU.

    Examples:
        >>> values, order = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([1, 0, 2])
        >>> segment_sum(values, order, torch.tensor([0, 1]), torch.tensor([1, 3]))
        tensor([[2.],
                [5.]])
    """
    out: Tensor = _SUM((values, order, stops, starts))
    return out
