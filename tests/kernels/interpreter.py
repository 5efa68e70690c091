"""The Triton kernels in place of the C++ ops on the CPU, for `pytest --backend triton`.

A launch's programs run in random order, and what a launcher allocates is full of NaN and lies between guards: a kernel
whose programs need each other, that leaves something out, or that writes beside its output, gives wrong numbers or
fails its test.
"""

from __future__ import annotations

import functools
import itertools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from fastadv.native.flags import check
from fastadv.ops import dispatch
from tests.csrc.guards import GUARD, guards_stand, room_for

WATCHED = ("fastadv.kernels", "tests.kernels")  # the modules whose allocations are guarded
rooms: list[Tensor] = []  # of this test
orders = random.Random()


def take_over() -> None:
    """From now on every op that has a Triton kernel runs it, on the CPU, where `fused` is None or True."""
    interpreter._convert_float = rounding(interpreter._convert_float)
    shuffle(interpreter.interpreter_builder)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(owner, name, between_guards(getattr(owner, name)))
    for op in dispatch.OPS:
        backend = op.backends.get("cuda")
        if backend is not None and backend.name == "Triton":
            op.backends = {**op.backends, "cpu": dispatch.Backend("Triton", "cpu", told(backend.function))}


@pytest.fixture(autouse=True)
def _watch() -> Iterator[None]:
    """Every test draws the same orders, by itself or among others."""
    orders.seed(0)
    rooms.clear()
    yield
    assert all(map(guards_stand, rooms)), "a kernel has written beside what its launcher had allocated"


def shuffle(builder: Any) -> None:
    """The interpreter counts programs up; each time it does, the next of a random order has its turn."""
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    left: list[tuple[int, ...]] = []

    def dim(*grid: int) -> None:
        set_dim(*grid)
        left[:] = itertools.product(*map(range, grid))
        orders.shuffle(left)

    builder.set_grid_dim = dim
    builder.set_grid_idx = lambda *_: set_index(*left.pop())


def between_guards(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`allocate`, for kernels' launchers with guards on both sides."""

    @functools.wraps(allocate)
    def allocated(*arguments: Any, **options: Any) -> Tensor:
        made = allocate(*arguments, **options)
        if not sys._getframe(1).f_globals.get("__name__", "").startswith(WATCHED) or made.numel() == 0:
            return made
        room = room_for(made.untyped_storage().nbytes() // made.itemsize, made.dtype)
        rooms.append(room)
        # By way of NumPy, since a view would tell by its offset that there is more.
        inner = torch.from_numpy(room[GUARD:-GUARD].view(torch.uint8).numpy()).view(made.dtype)
        return inner.as_strided(made.shape, made.stride())

    return allocated


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
