"""The wrapper around a model that knows nothing of it."""

from __future__ import annotations

import gc
from typing import TypeVar

from torch import nn

Wrapper = TypeVar("Wrapper", bound=nn.Module)


def wrapper_of(model: nn.Module, kind: type[Wrapper]) -> Wrapper | None:
    """The only wrapper of that kind that holds `model`; None where there is none, or more."""
    if not _of_kind(kind):
        return None
    gc.collect()  # one that is no longer used may still be there
    holding = [wrapper for wrapper in _of_kind(kind) if any(part is model for part in wrapper.modules())]
    return holding[0] if len(holding) == 1 else None


def _of_kind(kind: type[Wrapper]) -> list[Wrapper]:
    every = gc.get_objects()
    kinds = {one for one in set(map(type, every)) if issubclass(one, kind)}
    return [one for one in every if type(one) in kinds] if kinds else []
