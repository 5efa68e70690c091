"""The machine: what stands beside every figure, glibc's heap, and the environment that a run needs."""

from __future__ import annotations

import ctypes
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TUNED = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # mallopt's numbers, from malloc.h
SAME = ("processor", "cores", "threads", "torch", "python", "libc", "size")  # runs that agree in these may be mixed


def environment(threads: int, current: Mapping[str, str]) -> dict[str, str]:
    """`current` with that many threads, and with a heap that nobody has tuned."""
    kept = {name: value for name, value in current.items() if not name.startswith(TUNED)}
    return {**kept, "OMP_NUM_THREADS": str(threads)}


def retain_heap() -> bool:
    """From now on glibc keeps what is freed: it maps nothing by itself, and gives nothing back. Is it glibc?"""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):  # musl, macOS, Windows
        return False
    return all(mallopt(name, value) == 1 for name, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, -1), (TOP_PAD, 64 << 20)))


def describe(device: str = "cpu") -> dict[str, Any]:
    import torch  # late: who wants a name alone does not wait for it

    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "cores": os.cpu_count(),
        "libc": " ".join(platform.libc_ver()),
    }


def name(machine: Mapping[str, Any]) -> str:
    """Of the file that keeps a machine's figures."""
    cores = "" if "nvidia" in str(machine["processor"]).lower() else f" {machine['cores']} cores"
    return slug(f"{machine['processor']}{cores}")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
