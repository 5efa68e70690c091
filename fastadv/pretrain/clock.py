"""How long passes take, without waiting for the device: wall time on a CPU, events on a GPU."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from fastadv.engine.owner import Owner


class Clock:
    """Sums up the time spent inside of spans, by their names. What a GPU has measured is read by `read` alone."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)

    @contextlib.contextmanager
    def around(self, name: str) -> Iterator[None]:
        """One span."""
        begun = self._now()
        try:
            yield
        finally:
            self._spans[name].append((begun, self._now()))

    def read(self) -> dict[str, tuple[float, int]]:
        """Take the seconds and the number of all spans since the last call. On a GPU this waits for them."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found = {name: (sum(_between(*span) for span in spans), len(spans)) for name, spans in self._spans.items()}
        self._spans.clear()
        return found

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class Timed(Owner):
    """Runs the backward as without an owner, and measures the full passes of each step."""

    reads_gradients = False

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def sync(self, last: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Around a full pass."""
        return self._clock.around("full")


def attack_seconds(spans: dict[str, tuple[float, int]]) -> float:
    """How much longer steps have taken for the attack: all of their passes but as many full ones as micro-batches."""
    if "full" not in spans:
        return 0.0
    (whole, micro_batches), (full, passes) = spans["batch"], spans["full"]
    return max(0.0, whole - micro_batches * full / passes)


def _between(begun: Any, ended: Any) -> float:
    if isinstance(begun, float):
        return float(ended - begun)
    return float(begun.elapsed_time(ended)) / 1000
