"""Read `groups=` from what collators that pack documents give: [B, T] int64, each position's document.

Mamba's `seq_idx` numbers documents already: it is `groups` as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["from_batch", "from_cu_seq_lens", "from_position_ids"]


def from_position_ids(position_ids: Tensor) -> Tensor:
    """Number the documents of rows whose positions begin again with each: wherever one is not the last plus one.

    Args:
        position_ids: [B, T], integers.

    Raises:
        TypeError: they are no integers.
        ValueError: they are not [B, T].

    Examples:
        >>> from_position_ids(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]))
        tensor([[0, 0, 0, 1, 1],
                [0, 0, 1, 1, 1]])
    """
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise TypeError(f"position_ids are integers, not {position_ids.dtype}")
    if position_ids.dim() != 2:
        raise ValueError(f"position_ids must be [B, T], but have shape {tuple(position_ids.shape)}")
    return torch.nn.functional.pad((position_ids.diff(dim=1) != 1).cumsum(1), (1, 0))[:, : position_ids.shape[1]]


def from_cu_seq_lens(cu_seq_lens: Tensor, shape: tuple[int, int]) -> Tensor:
    """Number the documents of which the running sums of lengths are known, as attention kernels take them.

    Args:
        cu_seq_lens: [documents + 1], integers: 0, the first length, the sum of the first two, and so on, through the
            rows of the batch one after another. What comes after the last is padding, -1.
        shape: of the batch, (B, T).

    Raises:
        TypeError: they are no integers.
        ValueError: they are not one row of numbers.

    Examples:
        >>> from_cu_seq_lens(torch.tensor([0, 3, 5]), (1, 6))
        tensor([[ 0,  0,  0,  1,  1, -1]])
    """
    if cu_seq_lens.is_floating_point() or cu_seq_lens.dtype == torch.bool:
        raise TypeError(f"cu_seq_lens are integers, not {cu_seq_lens.dtype}")
    if cu_seq_lens.dim() != 1 or not len(cu_seq_lens):
        raise ValueError(f"cu_seq_lens must be [documents + 1], but have shape {tuple(cu_seq_lens.shape)}")
    place = torch.arange(shape[0] * shape[1], device=cu_seq_lens.device)
    number = torch.searchsorted(cu_seq_lens.long(), place, right=True) - 1
    return number.masked_fill(place >= cu_seq_lens[-1], -1).view(shape)


def from_batch(batch: Mapping[str, Any]) -> Tensor | None:
    """Number the documents of a batch of transformers or TRL: by `seq_idx`, `position_ids` or `cu_seq_lens_q`.

    None where there is nothing of these, or an `attention_mask`: a row is one sample then.

    Examples:
        >>> ids = torch.tensor([[5, 6, 7, 8, 9]])
        >>> from_batch({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])})
        tensor([[0, 0, 0, 1, 1]])
    """
    ids = next((batch[name] for name in ("input_ids", "position_ids", "seq_idx") if _is_batch(batch.get(name))), None)
    if ids is None or batch.get("attention_mask") is not None:
        return None
    numbers, places, lengths = (batch.get(name) for name in ("seq_idx", "position_ids", "cu_seq_lens_q"))
    if isinstance(numbers, Tensor) and numbers.shape == ids.shape:
        return numbers
    if isinstance(places, Tensor) and places.shape == ids.shape:
        return from_position_ids(places)
    return from_cu_seq_lens(lengths, (ids.shape[0], ids.shape[1])) if isinstance(lengths, Tensor) else None


def _is_batch(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() == 2
