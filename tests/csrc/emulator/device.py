"""A device whose kernels the CPU runs: tensors that say they are on CUDA, and the launchers of fastadv on top."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments.tensors import DTYPES
from fastadv.native import flags, launch, rows
from tests.csrc.emulator.build import Built
from tests.csrc.guards import Watched, guards_stand

DEVICE = torch.device("cuda", 0)


class Emulated(Watched):
    """Memory of the device, which is the CPU's. What an op allocates lies between guards, and is full of NaN."""

    rooms: ClassVar[list[Tensor]] = []  # type: ignore[misc]  # of all of them
    is_cuda, is_cpu, device = True, False, DEVICE  # type: ignore[assignment]

    def new_empty(self, size: Any, *, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return put(super().new_empty(size, dtype=dtype or self.dtype))

    def cpu(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).clone()

    def to(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        return self


def put(tensor: Tensor) -> Tensor:
    """The tensor's memory as the device's."""
    return tensor.as_subclass(Emulated)


def copied(tensor: Tensor) -> Tensor:
    """A copy of the tensor on the device. It begins at a multiple of 64 bytes, as torch's memory does."""
    return put(tensor.as_subclass(Tensor).clone())


@functools.cache
def _load(path: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader("tests.csrc.emulator._C", str(path))
    spec = importlib.util.spec_from_file_location(loader.name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    module.connect(Tensor, list(DTYPES), False)  # by attributes: DLPack would look at the memory, which is the CPU's
    return module


@contextlib.contextmanager
def running(built: Built, seed: int) -> Iterator[None]:
    """fastadv with its CUDA ops, which the emulator runs in the order that `seed` draws."""
    extension, kernels = _load(built.extension), ctypes.CDLL(str(built.kernels))
    table = ctypes.addressof(ctypes.c_byte.in_dll(kernels, "kernels"))
    ctypes.CDLL(str(built.extension)).emulator_use(ctypes.c_void_p(table))
    kernels.emulator_seed(ctypes.c_uint64(seed))
    Emulated.rooms.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_load", lambda: (extension, None))
        patch.setattr(native, "cuda_reason", lambda: None)
        patch.setattr(launch, "compiled", functools.cache(launch.compiled.__wrapped__))
        for name, one in list(vars(rows).items()):
            if isinstance(one, launch.Launch):
                patch.setattr(rows, name, launch.Launch(one._function, one.signature, one._check))
        patch.setitem(flags._flags, DEVICE, torch.zeros(1, dtype=torch.int32))
        patch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
        patch.setattr(Tensor, "pin_memory", put)
        yield
    assert all(map(guards_stand, Emulated.rooms)), "something was written beside what an op has allocated"
