"""Measure peak memory."""

from __future__ import annotations

import ctypes
import gc
import threading
from types import TracebackType
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped, unused-ignore]
import torch

if TYPE_CHECKING:
    from typing_extensions import Self

WHAT = {
    "cuda": "largest memory that torch's allocator held on the GPU during training",
    "cpu": "largest resident memory of the process during training, sampled every 10 ms; "
    "the heap was given back before",
}


class PeakMemory:
    """Measure peak memory between entry and exit: of torch's allocator on a GPU, of the process on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.kind = "cuda" if device.type == "cuda" else "cpu"
        self.device = device
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        release()
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.kind == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self.peak = max(self.peak, process.memory_info().rss)
            if self._stop.wait(0.01):
                return


def release() -> None:
    """Give freed memory back to the system, so that an earlier run does not count for the next one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # not glibc
        return
