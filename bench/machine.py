"""The machine, and the environment that a run asks for: glibc's heap and the number of threads."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# A heap that keeps what was freed: nothing is mapped by itself, and nothing is given back.
RETAINED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(64 << 20)}
TUNED = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def environment(heap: str, threads: int, current: Mapping[str, str]) -> dict[str, str]:
    """`current` with the heap and threads that are asked for; "users" is glibc untouched."""
    kept = {name: value for name, value in current.items() if not name.startswith(TUNED)}
    return {**kept, "OMP_NUM_THREADS": str(threads), **(RETAINED if heap == "retained" else {})}


def describe(heap: str) -> dict[str, Any]:
    """What stands beside every figure."""
    return {
        "heap": heap,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "libc": " ".join(platform.libc_ver()),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
