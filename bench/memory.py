"""Peak memory: of one more run in this process, or in its own: `python -m bench.memory CASE WHO SIZE ROUNDS`."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from bench.cases import cases
from bench.divergences import CONTESTANTS
from bench.race import Entry, nothing
from bench.workloads import SIZES, Size

MIB = 1 << 20
CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux: what resets the peak
ROOT = Path(__file__).parent.parent
ACCUMULATING = "plain, accumulating"  # plain training's second micro-batch, which finds gradients there


def peaks(entries: Mapping[str, Entry], device: str) -> dict[str, int]:
    """Bytes that one run of each needs beyond what is there before it; nothing where the system does not say."""
    if device == "cpu":
        return {name: on_host(entry)[0] for name, entry in entries.items()} if CLEAR_REFS.exists() else {}
    found = {}
    for name, entry in entries.items():  # of torch's allocator
        entry.setup()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        entry.run()
        torch.cuda.synchronize()
        found[name] = torch.cuda.max_memory_allocated() - before
    return found


def on_host(entry: Entry) -> tuple[int, int, float]:
    """Resident bytes that a run adds at its peak, and all; and its seconds. Freed memory is given back first."""
    entry.setup()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset_peak()
    before, start = peak(), time.perf_counter()
    entry.run()
    seconds = time.perf_counter() - start
    return peak() - before, peak(), seconds


def reset_peak() -> None:
    CLEAR_REFS.write_text("5", encoding="ascii")  # VmHWM <- VmRSS


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


def contestants(size: Size) -> list[tuple[tuple[str, str], str]]:
    """Who, of the largest PGD-3 step and the largest divergence, which have a group of their own each."""
    step, logits = f"PGD-3, V {size.steps[-1][-1]:,}", "{} x {:,} logits".format(*size.logits[-1])
    whole = f"peak memory, {step}", f"training step, {step}"
    ops = f"peak memory, symmetric KL, {logits}", f"symmetric KL and gradients, {logits}"
    return [(whole, who) for who in (*size.pgd, ACCUMULATING)] + [(ops, who) for who in CONTESTANTS]


def apart(case: str, contestant: str, size: Size, named: str, rounds: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds, and the figures: over plain training, or over what is there before."""
    found = _measured(case, contestant, named, rounds)
    over, whole = median(found["over"]), median(found["whole"])
    if "PGD" not in case:
        rows, classes = size.logits[-1]
        shown = {"over_inputs_mib": round(over / MIB, 1), "over_inputs_logits": round(over / (4 * rows * classes), 2)}
        return found["seconds"], shown
    beyond = whole - median(_measured(case, "plain", named, rounds)["whole"])
    batch, length, _ = size.steps[-1]
    figures = {"peak_mib": round(whole / MIB, 1), "over_plain_mib": round(beyond / MIB, 1)}
    buffers = beyond / (4 * batch * length * size.network[0])  # one float32 vector per position
    return found["seconds"], {**figures, "over_plain_perturbations": round(buffers, 1)}


@functools.cache
def _measured(case: str, contestant: str, size: str, rounds: int) -> dict[str, list[float]]:
    if not CLEAR_REFS.exists():
        pytest.skip("needs Linux: /proc/self/clear_refs resets the peak")
    command = [sys.executable, "-m", "bench.memory", case, contestant, size, str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = json.loads(done.stdout)
    return found


def main() -> None:
    case, contestant, size, rounds = sys.argv[1:]
    entry = cases(SIZES[size])[case].make().entries["plain" if contestant == ACCUMULATING else contestant]
    entry.setup()
    entry.run()  # warms up
    entry = entry._replace(setup=nothing) if contestant == ACCUMULATING else entry
    over, whole, seconds = zip(*(on_host(entry) for _ in range(int(rounds))), strict=True)
    print(json.dumps({"over": over, "whole": whole, "seconds": seconds}))


if __name__ == "__main__":
    main()
