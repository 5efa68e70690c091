"""A GPU that is not there: Triton compiles and launches for it as ever, up to the call that would reach a driver.

What is left is the host's part of a launch, for real: a kernel's arguments bound and specialised, the key of its cache,
the compiled kernel found. `count` and `inside` see each launch, so that a test can count them and a clock stop them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from triton.runtime import driver

from bench.gpu.abroad import LAUNCHERS, Abroad
from fastadv.arguments.segments import Segments
from fastadv.kernels import common
from fastadv.ops import dispatch
from fastadv.ops.segment_sum import eager_segments

Function = Callable[..., Any]
Around = Callable[[Any], contextlib.AbstractContextManager[Any]]


class Utilities:
    """What a driver knows of a binary and of its device."""

    @staticmethod
    def load_binary(*_: object) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads

    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}


class Launcher:
    """The function that a driver makes of a kernel; this one returns at once."""

    def __init__(self, source: object, metadata: object) -> None: ...

    def __call__(self, *_: object) -> None: ...


class Nowhere(Abroad):
    """A driver for sm_90 that also loads and launches, nothing."""

    launcher_cls, utils = Launcher, Utilities


@contextlib.contextmanager
def on_the_cpu(around: Around | None = None) -> Iterator[None]:
    """Inside, ops run on the CPU's tensors what they would run on a GPU's, and no kernel does anything.

    Ops in C++ run as ever. Results are whatever the memory held: for clocks and counts alone.

    Args:
        around: what is entered around every launch, with its kernel.
    """
    active, launches = driver._active, [(module, module.launch) for module in LAUNCHERS]

    def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
        with around(kernel):
            common.launch(kernel, *arguments, **constants)

    driver._active = Nowhere("sm_90")
    try:
        for module, _ in launches if around is not None else []:
            module.launch = launch
        with running(lambda op: on_a_gpu(op.backends.get("cuda"))):
            yield
    finally:
        driver._active = active
        for module, function in launches:
            module.launch = function


def on_a_gpu(backend: dispatch.Backend | None) -> Function | None:
    """What a GPU runs, where that takes tensors on the CPU as well."""
    return backend.function if backend is not None and backend.name in ("Triton", "PyTorch") else None


def nothing() -> contextlib.AbstractContextManager[None]:
    """Inside, ops return tensors of the right shapes and do nothing. Where equal ids lie is found out once."""
    plans: dict[Any, Segments] = {}

    def segments(ids: Tensor, mask: Tensor | None, vocabulary: int) -> Segments:
        if ids.shape not in plans:
            plans[ids.shape] = eager_segments(ids, mask, vocabulary)
        return plans[ids.shape]

    without: dict[str, Function] = {
        "gather_perturb": lambda weight, ids, *_: weight.new_empty((*ids.shape, weight.shape[1])),
        "segments": segments,
    }
    return running(lambda op: without.get(op.name, dispatch.in_place))


@contextlib.contextmanager
def running(chosen: Callable[[dispatch.Op], Function | None]) -> Iterator[None]:
    """Inside, ops run on the CPU what is chosen for them; None: what they ran before."""
    known = [(op, op.backends) for op in dispatch.OPS]
    try:
        for op, backends in known:
            function = chosen(op)
            if function is not None:
                op.backends = {**backends, "cpu": dispatch.Backend("chosen", "cpu", function)}
        yield
    finally:
        for op, backends in known:
            op.backends = backends
