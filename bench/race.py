"""Contestants timed in turns, so that what the machine does meanwhile meets all of them alike."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIMIT = "physical limit"
WARMUP = 2


class Entry(NamedTuple):
    """A contestant: `setup` is not timed, `run` is."""

    setup: Callable[[], object]
    run: Callable[[], object]


class Copy:
    """The copy of a large tensor: measures the bandwidth, and leaves nothing of earlier data in the caches."""

    def __init__(self, elements: int, device: torch.device | str = "cpu") -> None:
        self.source, self.target = torch.ones(elements, device=device), torch.zeros(elements, device=device)
        self.bytes = 2 * 4 * elements  # read and written

    def __call__(self) -> None:
        self.target.copy_(self.source)


class Result(NamedTuple):
    """The rounds of each contestant in seconds, and of the copy."""

    seconds: dict[str, list[float]]
    copy: list[float]
    copy_bytes: int

    @property
    def bandwidth(self) -> float:
        """Bytes per second, read and written: the median."""
        return self.copy_bytes / sorted(self.copy)[len(self.copy) // 2]

    def with_limit(self, moved: int) -> Result:
        """Another contestant: the time in which that copy would have moved `moved` bytes."""
        limit = [seconds * moved / self.copy_bytes for seconds in self.copy]
        return self._replace(seconds={**self.seconds, LIMIT: limit})


Run = Callable[[], object]
Reading = Callable[[], tuple[float, float]]  # seconds of the copy and of the run, asked for when the race is over


def race(
    entries: dict[str, Entry], rounds: int, copy: Copy, clock: Callable[[Run, Run], Reading] | None = None
) -> Result:
    """Time `rounds` of each; every round begins with the next contestant, and each run with the copy.

    `clock(copy, run)` runs both; the default is the host's.
    """
    clock = clock or _host_clock
    readings: list[tuple[str, Reading]] = []
    gc.collect()
    gc.disable()
    try:
        for index in range(-WARMUP, rounds):
            for name in _rotated(list(entries), index):
                entries[name].setup()
                reading = clock(copy, entries[name].run)
                if index >= 0:
                    readings.append((name, reading))
    finally:
        gc.enable()
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    copied = []
    for name, reading in readings:
        copy_seconds, run_seconds = reading()
        copied.append(copy_seconds)
        seconds[name].append(run_seconds)
    return Result(seconds, copied, copy.bytes)


def _host_clock(copy: Run, run: Run) -> Reading:
    found = _timed(copy), _timed(run)
    return lambda: found


def _rotated(names: list[str], by: int) -> Iterator[str]:
    start = by % len(names)
    return itertools.chain(names[start:], names[:start])


def _timed(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# What hands a race's rounds to pytest-benchmark: its timer reads this clock, and its target moves it on.
_now = 0.0


def replay_clock() -> float:
    """The timer of the benchmarks: seconds that `report` has let pass."""
    return _now


def _pass(seconds: float) -> None:
    global _now  # noqa: PLW0603
    _now += seconds


def report(benchmark: Any, group: str, seconds: list[float], info: dict[str, Any]) -> None:
    """Enter rounds that were timed in a race as the benchmark's own."""
    rounds = iter(seconds)
    benchmark.group = group
    benchmark.extra_info.update(info)
    benchmark.pedantic(_pass, setup=lambda: ((next(rounds),), {}), rounds=len(seconds))


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|, in float64."""
    return float((got.double() - want.double()).norm() / want.double().norm())
