"""Peak memory of a PGD-3 step, in a process of its own: `python -m bench.memory fastadv --size tiny`."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import re
import time
from pathlib import Path
from typing import Any

from bench import contestants as who
from bench.workloads import SIZES, Size, classifier, loss_closure

ACCUMULATING = "plain, accumulating"
CONTESTANTS = ("plain", ACCUMULATING, "classic script", "plain, index_add", "plain PyTorch", "fastadv")
MIB = 1 << 20


def measure(contestant: str, size: Size, rounds: int) -> dict[str, Any]:
    """Each round's peak resident bytes and seconds, after a step that warms up.

    Gradients are None before a step; `ACCUMULATING` is plain training's second micro-batch, which finds them there.
    """
    vocabulary = size.vocabularies[-1]
    model = classifier(size.model, vocabulary)
    closure = loss_closure(model, size, vocabulary)
    accumulating = contestant == ACCUMULATING
    step = who.training("plain" if accumulating else contestant, "PGD-3", model, closure)
    step()
    peaks, seconds = [], []
    for _ in range(rounds):
        if not accumulating:
            model.zero_grad()
        release()
        reset_peak()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        peaks.append(peak())
    return {"peaks": peaks, "seconds": seconds}


def perturbation_bytes(size: Size) -> int:
    """One float32 vector per position."""
    return 4 * size.batch * size.length * size.model[0]


def release() -> None:
    """Give freed memory back, so that a step's peak holds nothing of the step before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM <- VmRSS


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return 1024 * int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--size", choices=tuple(SIZES), default="minilm")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measure(options.contestant, SIZES[options.size], options.rounds)))


if __name__ == "__main__":
    main()
