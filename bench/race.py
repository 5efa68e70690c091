"""The timing engine: contestants run in turns, cold, by the clock of their device.

The machine drifts by more than the differences that matter: in turns, the drift meets all alike.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch

LIMIT = "physical limit"
WARMUP, FEWEST = 2, 3
Run = Callable[[], object]
Reading = Callable[[], tuple[float, float]]  # seconds of the copy and of the run, asked for when the race is over


def nothing() -> None: ...


class Entry(NamedTuple):
    setup: Run  # not timed
    run: Run
    answer: Run | None = None  # runs it and returns what it found, if that is not what `run` returns
    compared: bool = True  # with the others; what stands there for scale alone does other work
    waits: bool = False  # reads numbers on the host, so that it cannot be captured


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
        return self.copy_bytes / median(self.copy)

    @property
    def microseconds(self) -> dict[str, float]:
        return {name: round(1e6 * median(rounds), 2) for name, rounds in self.seconds.items()}

    def with_limit(self, moved: int) -> Result:
        """Another contestant: the time in which that copy would have moved `moved` bytes."""
        limit = [seconds * moved / self.copy_bytes for seconds in self.copy]
        return self._replace(seconds={**self.seconds, LIMIT: limit})

    def speed(self, name: str, moved: int) -> dict[str, float]:
        """GB/s of a contestant that moves so many bytes, and its share of the copy's."""
        speed = moved / median(self.seconds[name])
        return {"bytes": moved, "gbps": round(speed / 1e9, 2), "of_copy": round(speed / self.bandwidth, 3)}


def once(entry: Entry, copy: Copy) -> Reading:
    """Set up, copy, and run by the clock: the host's, or events on the device.

    While a device copies, the host is ahead; a run that waits for the device pays for that as well.
    """
    entry.setup()
    gc.collect()
    cuda = copy.source.is_cuda
    mark: Callable[[], Any] = _event if cuda else time.perf_counter
    start = mark()
    copy()
    begun = mark()
    entry.run()  # and what it returns is freed
    end = mark()
    if not cuda:
        return lambda: (begun - start, end - begun)

    def reading() -> tuple[float, float]:
        end.synchronize()
        return start.elapsed_time(begun) / 1e3, begun.elapsed_time(end) / 1e3

    return reading


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def captured(entry: Entry) -> Entry:
    """Its run as a CUDA graph, which takes the host out of the way. Without a GPU, and if it waits: as it is."""
    if entry.waits or not torch.cuda.is_available():
        return entry
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            entry.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        entry.run()
    return entry._replace(run=graph.replay)


def turns(names: Sequence[str], rounds: int, warmup: int, *, back: bool = False) -> Iterator[tuple[int, list[str]]]:
    """Rounds, numbered from -`warmup`, and who runs: each begins with the next name, and goes `back` to it."""
    for index in range(-warmup, rounds):
        first = index % len(names)
        order = [*names[first:], *names[:first]]
        yield index, order + order[::-1] * back


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, garbage is collected when `once` says so, and what is there already is not looked at."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def race(
    entries: Mapping[str, Entry], rounds: int, copy: Copy, *, warmup: int = WARMUP, budget: float = 1e9, taken: Any = ()
) -> Result:
    """Time `rounds` of each, every run behind the copy.

    A contestant that has taken `budget` seconds sits out the rest, once it has `FEWEST` rounds; `taken` is what it has
    taken before.
    """
    readings: dict[str, list[Reading]] = {name: [] for name in entries}
    spent = {**dict.fromkeys(entries, 0.0), **dict(taken)}
    with quiet():
        for index, order in turns(list(entries), rounds, warmup):
            for name in order:
                if spent[name] > budget and (index < 0 or len(readings[name]) >= FEWEST):
                    continue
                start = time.perf_counter()
                reading = once(entries[name], copy)
                spent[name] += time.perf_counter() - start
                if index >= 0:
                    readings[name].append(reading)
    both = {name: [reading() for reading in mine] for name, mine in readings.items()}
    copied = [copy_seconds for mine in both.values() for copy_seconds, _ in mine]
    return Result({name: [run for _, run in mine] for name, mine in both.items()}, copied, copy.bytes)


def iqr(values: Sequence[float]) -> float:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return high - low


def interval(values: Sequence[float], resampled: int = 2_000) -> tuple[float, float]:
    """The 95 % interval of the median, by bootstrap; the same for the same values."""
    drawing = random.Random(0)
    medians = sorted(median(drawing.choices(values, k=len(values))) for _ in range(resampled))
    return medians[round(0.025 * (resampled - 1))], medians[round(0.975 * (resampled - 1))]
