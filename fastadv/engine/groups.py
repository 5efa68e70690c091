"""Where equal ids lie in the calls of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastadv.engine.call import Call
from fastadv.engine.embedding import table_of, vocabulary
from fastadv.ops import Segments, segments


def group(calls: Sequence[Call], modules: Sequence[nn.Module], fused: bool | None) -> Segments:
    """Group the positions of `calls` by token id; the tables of several `modules` stand one after the other."""
    tables = [table_of(module) for module in modules]
    first = [next(i for i, other in enumerate(tables) if other is table) for table in tables]
    sizes = [(vocabulary(module) or 0) if first[i] == i else 0 for i, module in enumerate(modules)]
    offsets = [sum(sizes[:index]) for index in first]
    ids = [ids_of(call) + offsets[call.module] if offsets[call.module] else ids_of(call) for call in calls]
    masks = None if all(call.mask is None for call in calls) else together([_mask(call) for call in calls])
    return segments(together(ids), sum(sizes), mask=masks, fused=fused).trimmed()


def together(parts: Sequence[Tensor]) -> Tensor:
    """One after the other, without a copy where there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def ids_of(call: Call) -> Tensor:
    """What the call looked up, [N]."""
    ids = call.ids if call.first is None else call.first.copy
    assert ids is not None
    return ids.reshape(-1)


def _mask(call: Call) -> Tensor:
    return torch.ones_like(ids_of(call), dtype=torch.bool) if call.mask is None else call.mask.reshape(-1)
