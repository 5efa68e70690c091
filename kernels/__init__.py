"""The Triton floor: one file per op. A file holds its kernels, and the launcher that `fastadv.ops` calls.

Importing this package does not import Triton; `reason` says why its kernels cannot run, if they cannot.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

__all__ = ["interpreted", "launcher", "reason"]

OLDEST = (7, 0)  # the first compute capability that Triton compiles for


def interpreted() -> bool:
    """Whether Triton interprets kernels in numpy, for tests. Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def reason() -> str | None:
    """Why the Triton kernels cannot run here; None if they can."""
    try:
        found = importlib.util.find_spec("triton")
    except ImportError:  # an import hook refuses it
        found = None
    if found is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability() < OLDEST:
        return f"the device's compute capability is below {'.'.join(map(str, OLDEST))}"
    return None


def launcher(name: str, op: str | None = None) -> Any:
    """The launcher of `op` in the file `name`, which is imported, and Triton with it, when it is first called."""

    def launch(*arguments: Any) -> Any:
        return _find(name, op or name)(*arguments)

    launch.__name__ = launch.__qualname__ = op or name
    return launch


@functools.cache
def _find(name: str, op: str) -> Any:
    return getattr(importlib.import_module(f"fastadv.kernels.{name}"), op)
