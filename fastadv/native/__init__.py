"""The C++ and CUDA floor: loads `fastadv._C`, and keeps the reason when it is not there.

One launcher per op lives beside this file; `launch` says how they call.
"""

from __future__ import annotations

import functools
import importlib
import json
import warnings
from importlib.resources import files
from types import ModuleType
from typing import Any

import torch  # also brings libgomp, which the extension then shares

from fastadv.arguments.tensors import DTYPES

__all__ = ["available", "build_info", "cuda_reason", "reason"]


@functools.cache
def build_info() -> dict[str, Any]:
    """The build's record: compilers, CUDA architectures, and why a part was left out; empty if unbuilt."""
    record = files("fastadv") / "_build_info.json"
    if not record.is_file():
        return {}
    info: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
    return info


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("fastadv._C")
    except ModuleNotFoundError:
        why = build_info().get("native_reason")
        return None, why or "the C++ extension is not built; `pip install .` builds it"
    except ImportError as error:  # built, but for another platform or without a library it needs
        return None, f"the C++ extension does not load: {error}"
    module.connect(torch.Tensor, list(DTYPES), True)
    return module, None


def extension() -> Any:
    """The module `fastadv._C`.

    Raises:
        RuntimeError: it is not there; the message says why.
    """
    module, why = _load()
    if module is None:
        raise RuntimeError(f"fastadv's C++ extension is not available: {why}")
    return module


def available() -> bool:
    """Whether the C++ ops are there."""
    return _load()[0] is not None


def reason() -> str | None:
    """Why the C++ ops are missing; None if they are there."""
    return _load()[1]


@functools.cache
def cuda_reason() -> str | None:
    """Why the CUDA ops cannot run here; None if they can.

    A toolkit newer than the driver is one warning: the C++ ops on CUDA then fall back to eager.
    """
    module, why = _load()
    if module is None:
        return why
    if not module.cuda:
        return build_info().get("cuda_reason") or "compiled without CUDA"
    if not torch.cuda.is_available():
        return "compiled, but torch sees no CUDA device"
    problem: str | None = module.cuda_problem()
    if problem is not None:
        problem = f"compiled with CUDA {build_info().get('cuda_version', '?')}, but the driver says: {problem}"
        warnings.warn(f"fastadv: native CUDA ops are off: {problem}", RuntimeWarning, stacklevel=2)
    return problem
