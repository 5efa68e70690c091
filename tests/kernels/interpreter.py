"""The Triton kernels in place of the C++ ops on the CPU, for `pytest --backend triton`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastadv.native.flags import check
from fastadv.ops import dispatch


def take_over() -> None:
    """From now on every op that has a Triton kernel runs it, on the CPU, where `fused` is None or True."""
    interpreter._convert_float = rounding(interpreter._convert_float)
    for op in dispatch.OPS:
        backend = op.backends.get("cuda")
        if backend is not None and backend.name == "Triton":
            op.backends = {**op.backends, "cpu": dispatch.Backend("Triton", "cpu", told(backend.function))}


def rounding(convert: Callable[..., Any]) -> Callable[..., Any]:
    """The interpreter cuts float32 off where it converts to bfloat16; a GPU rounds to the nearest, ties to even."""

    def converted(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)

    return converted


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """On a GPU an index out of range is told when somebody asks; here somebody always does."""

    def run(*arguments: Any) -> Any:
        result = function(*arguments)
        check(torch.device("cpu"))
        return result

    return run
