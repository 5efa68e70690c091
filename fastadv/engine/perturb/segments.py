"""Where equal ids lie in the lookups of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastadv.engine.lookup import Lookup
from fastadv.engine.model.find import table_of, vocabulary
from fastadv.ops import Segments, segments


def group(lookups: Sequence[Lookup], modules: Sequence[nn.Module], fused: bool | None) -> Segments:
    """Group the positions of `lookups` by token id; the tables of several `modules` stand one after the other."""
    masks = None if all(lookup.mask is None for lookup in lookups) else together([_mask(lookup) for lookup in lookups])
    ids, rows = numbered(lookups, modules)
    return segments(ids, rows, mask=masks, fused=fused).trimmed()


def numbered(lookups: Sequence[Lookup], modules: Sequence[nn.Module]) -> tuple[Tensor, int]:
    """The ids of all positions [N], those of a later table after those of the earlier ones, and how many there are."""
    if len(modules) == 1:
        return together([ids_of(lookup) for lookup in lookups]), vocabulary(modules[0]) or 0
    tables = [table_of(module) for module in modules]
    first = [next(i for i, other in enumerate(tables) if other is table) for table in tables]
    sizes = [(vocabulary(module) or 0) if first[i] == i else 0 for i, module in enumerate(modules)]
    offsets = [sum(sizes[:index]) for index in first]
    every = [
        ids_of(lookup) + offsets[lookup.module] if offsets[lookup.module] else ids_of(lookup) for lookup in lookups
    ]
    return together(every), sum(sizes)


def together(parts: Sequence[Tensor]) -> Tensor:
    """One after the other, without a copy where there is only one."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def ids_of(lookup: Lookup) -> Tensor:
    """What the lookup looked up, [N]."""
    ids = lookup.ids if lookup.first is None else lookup.first.copy
    assert ids is not None
    return ids.reshape(-1)


def _mask(lookup: Lookup) -> Tensor:
    return torch.ones_like(ids_of(lookup), dtype=torch.bool) if lookup.mask is None else lookup.mask.reshape(-1)
