"""The wrapper around a model that knows nothing of it."""

from __future__ import annotations

import gc
from typing import TypeVar

from torch import nn

Wrapper = TypeVar("Wrapper", bound=nn.Module)


def wrapper_of(model: nn.Module, kind: type[Wrapper]) -> Wrapper | None:
    """The only wrapper of that kind that holds `model`; None where there is none, or more."""
    if any(issubclass(type(one), kind) for one in gc.get_objects()):
        gc.collect()  # one that is no longer used may still be there
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), kind)]
    holding = [wrapper for wrapper in wrappers if any(part is model for part in wrapper.modules())]
    return holding[0] if len(holding) == 1 else None
