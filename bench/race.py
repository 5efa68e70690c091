"""Contestants timed in turns, so that what the machine does meanwhile meets all of them alike."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIMIT = "physical limit"
WARMUP, FEWEST = 2, 3


class Entry(NamedTuple):
    """A contestant: `setup` is not timed, `run` is."""

    setup: Callable[[], object]
    run: Callable[[], object]
    answer: Callable[[], object] | None = None  # runs it and says what it found, if that is not what `run` returns
    compared: bool = True  # with the others; what stands there for scale alone does other work


class Copy:
    """The copy of a large tensor: measures the bandwidth, and leaves nothing of earlier data in the caches."""

    def __init__(self, elements: int, device: torch.device | str = "cpu") -> None:
        self.source, self.target = torch.ones(elements, device=device), torch.zeros(elements, device=device)
        self.bytes = 2 * 4 * elements  # read and written

    def __call__(self) -> None:
        self.target.copy_(self.source)


class Result(NamedTuple):
    """The rounds of each contestant in seconds, and of the copy before each of them."""

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
    entries: dict[str, Entry],
    rounds: int,
    copy: Copy,
    clock: Callable[[Run, Run], Reading] | None = None,
    *,
    warmup: int = WARMUP,
    budget: float = math.inf,
    taken: Mapping[str, float] | None = None,
) -> Result:
    """Time `rounds` of each; every round begins with the next contestant, and each run with the copy.

    `clock(copy, run)` runs both; the default is the host's. A contestant that has taken `budget` seconds sits out the
    rest, once it has `FEWEST` rounds; `taken` says what it has taken before.
    """
    clock = clock or _host_clock
    readings: dict[str, list[Reading]] = {name: [] for name in entries}
    spent = {**dict.fromkeys(entries, 0.0), **(taken or {})}
    gc.collect()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            for name in _rotated(list(entries), index):
                if spent[name] > budget and (index < 0 or len(readings[name]) >= FEWEST):
                    continue
                start = time.perf_counter()
                entries[name].setup()
                reading = clock(copy, entries[name].run)
                spent[name] += time.perf_counter() - start
                if index >= 0:
                    readings[name].append(reading)
    finally:
        gc.enable()
    both = {name: [reading() for reading in mine] for name, mine in readings.items()}
    copied = [copy_seconds for mine in both.values() for copy_seconds, _ in mine]
    return Result({name: [run for _, run in mine] for name, mine in both.items()}, copied, copy.bytes)


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
