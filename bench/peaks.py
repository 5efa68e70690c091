"""The most memory that a run needs, in this process."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 1 << 20
CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: what resets the peak


def host_peak(setup: Callable[[], object], run: Callable[[], object]) -> int | None:
    """Resident bytes that a run adds at its peak; None where the system does not say."""
    if not CLEAR_REFS.exists():
        return None
    setup()
    release()
    reset_peak()
    before = peak()
    run()
    return peak() - before


def cuda_peak(setup: Callable[[], object], run: Callable[[], object]) -> int | None:
    """Bytes of torch's allocator that a run adds at its peak."""
    setup()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def release() -> None:
    """Give freed memory back, so that a step's peak holds nothing of the step before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    CLEAR_REFS.write_text("5", encoding="ascii")  # VmHWM <- VmRSS


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])
