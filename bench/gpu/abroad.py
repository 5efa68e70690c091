"""Compile the Triton kernels for a GPU that is not here, as their launchers would have them compiled."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastadv.kernels import ascend, divergence, gather_perturb, moment_step, segment_sum
from fastadv.kernels.common import REGISTERS

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LAUNCHERS = (ascend, divergence, gather_perturb, moment_step, segment_sum)


class Abroad:
    """A driver for a device that is not here: it knows what to compile for, and nothing else."""

    def __init__(self, target: str) -> None:
        number = int(re.sub(r"\D", "", target))
        self.target = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", number, 32)
        self.device = 1000 + number  # a compiler's settings are kept by device

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002
        return 0


class Compiled(NamedTuple):
    """What would have been launched."""

    name: str
    kernel: Any
    grid: tuple[int, ...]


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """Inside, launchers compile for `target` ("sm_90", "gfx942"), and launch nothing."""
    found: list[Compiled] = []
    registers = {} if target.startswith("gfx") else REGISTERS

    def compile_only(kernel: Any, grid: Any, device: Any, *arguments: Any, **constants: Any) -> None:  # noqa: ARG001
        compiled = kernel.warmup(*arguments, grid=grid, **{**registers, **constants})
        found.append(Compiled(kernel.__name__, compiled, grid))

    with contextlib.ExitStack() as patches:
        for module in LAUNCHERS:
            patches.enter_context(mock.patch.object(module, "launch", compile_only))
        patches.enter_context(mock.patch.object(driver, "_active", Abroad(target)))
        yield found
