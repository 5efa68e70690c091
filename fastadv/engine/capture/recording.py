"""Around the recording of a CUDA graph: what may not happen meanwhile, and what a failure must not leave behind."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def recording(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Inside, `graph` records what happens on `device`, which is the current one.

    A recording that fails ends with an error from `capture_end`. Up to torch 2.11 that comes before torch has ended its
    own part: the stream of the capture stays current, and the allocator waits for the capture's end. The stream is one
    of this device: torch's own for captures is of the device that was current when it was first used.
    """
    before, pool = torch.cuda.current_stream(device), torch.cuda.graph_pool_handle()
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    try:
        with no_garbage(), casts_apart(), torch.cuda.graph(graph, pool=pool, stream=stream):
            yield
    except BaseException:
        torch.cuda.set_stream(before)
        with contextlib.suppress(RuntimeError):  # torch has ended it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        raise


@contextlib.contextmanager
def no_garbage() -> Iterator[None]:
    """Inside, no garbage is collected: what that frees on a device (another graph, an event) would end a capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def casts_apart() -> Iterator[None]:
    """Inside, an autocast that is on around it casts weights anew, and keeps none of the casts for later.

    A graph that took casts from before would read them in every replay, when the weights have long moved on. One that
    left its own behind would leave memory that replays write to.
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
