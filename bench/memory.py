"""Peak memory of a PGD-3 step, in a process of its own: `python -m bench.memory fused --size tiny`."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from bench import training
from bench.peaks import peak, release, reset_peak
from bench.workloads import SIZES, Size, classifier, inputs, loss_closure

ACCUMULATING = "plain, accumulating"
CONTESTANTS = ("plain", ACCUMULATING, "reference", "torch", "fused")


def measure(contestant: str, size: Size, rounds: int) -> dict[str, Any]:
    """Each round's peak resident bytes and seconds, after a step that warms up.

    Gradients are None before a step; `ACCUMULATING` is plain training's second micro-batch, which finds them there.
    """
    vocabulary = size.vocabularies[-1]
    model = classifier(size.network, vocabulary)
    closure = loss_closure(model, inputs(*size.batch, vocabulary))
    accumulating = contestant == ACCUMULATING
    step = training.step("plain" if accumulating else contestant, "PGD-3", model, closure)
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
    return 4 * size.batch[0] * size.batch[1] * size.network[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("contestant", choices=CONTESTANTS)
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(json.dumps(measure(options.contestant, SIZES[options.size], options.rounds)))


if __name__ == "__main__":
    main()
