"""Ranges for `torch.profiler`: "fastadv::step" and its parts. Without a profiler they cost nothing."""

from __future__ import annotations

import contextlib
from typing import Any

from torch.autograd import profiler

_NOTHING = contextlib.nullcontext()


def span(name: str) -> contextlib.AbstractContextManager[Any]:
    """A range called "fastadv::NAME" around a block."""
    if not getattr(profiler, "_is_profiler_enabled", False):
        return _NOTHING
    return profiler.record_function(f"fastadv::{name}")
