"""A contest: contestants that are held against each other first, and then timed in one race."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from bench import machine, peaks
from bench.gpu.clock import device_race
from bench.race import LIMIT, Copy, Entry, Result, relative_error, report

ROUNDS, WARMUP, BUDGET = 15, 2, 4.0  # BUDGET: seconds that a contestant may take before it sits out


class Field(NamedTuple):
    """Who takes part, and in what."""

    entries: Mapping[str, Entry]
    moved: int | None = None  # bytes that the work has to move
    shape: tuple[int, ...] = ()
    tolerance: float = 1e-4  # how far answers may be from the first one's, relative
    extra: Mapping[str, Any] = {}
    rewind: Callable[[], object] = lambda: None  # inputs rotate with each `setup`; this puts the first one in place
    weighed: bool = True  # whether one more run of each shows its peak memory


class Contests:
    """The races of a session: each is run when its first contestant is asked for."""

    def __init__(self, copy: Copy, rounds: int, info: Mapping[str, Any], device: str) -> None:
        self.copy, self.rounds, self.info, self.device = copy, rounds, info, device
        self.heap = "users"
        self.key: tuple[str, str] | None = None  # the last race; what it was made of is forgotten with the next
        self.field, self.result, self.peaks = Field({}), Result({}, [], 0), dict[str, int]()

    def use(self, heap: str) -> None:
        """With the heap that keeps what was freed there is no way back."""
        if heap == self.heap:
            return
        if heap == "users":
            raise RuntimeError("the heap keeps what was freed: benchmarks on the users' heap must come first")
        if not machine.retain_heap():
            pytest.skip("no glibc: there is one heap")
        self.heap = heap

    def enter(
        self,
        benchmark: Any,
        group: str,
        contestant: str,
        make: Callable[[], Field],
        *,
        rounds: int = ROUNDS,
        warmup: int = WARMUP,
        budget: float = BUDGET,
    ) -> None:
        """Report one contestant's rounds; the first one of a group runs the race of all."""
        if self.key != (group, self.heap):
            self._run(make, self.rounds or rounds, min(warmup, self.rounds or warmup), budget)
            self.key = (group, self.heap)
        if contestant not in self.result.seconds:
            pytest.skip(f"{contestant} takes no part here: it is not installed (the extra `bench`), or memory is short")
        report(benchmark, group, self.result.seconds[contestant], self._info(contestant))

    def _run(self, make: Callable[[], Field], rounds: int, warmup: int, budget: float) -> None:
        self.key, self.field = None, Field({})
        torch._dynamo.reset()
        gc.collect()
        self.field = field = make()
        taken = check(field.entries, field.tolerance, field.rewind)
        entries = dict(field.entries)
        self.result = device_race(entries, rounds, self.copy, warmup=warmup, budget=budget, taken=taken)
        self.peaks = self._peaks(entries) if field.weighed else {}
        if field.moved is not None:
            self.result = self.result.with_limit(field.moved)

    def _peaks(self, entries: Mapping[str, Entry]) -> dict[str, int]:
        """Bytes that one run needs beyond what is there before it."""
        if self.device == "cpu" and self.heap != "users":
            return {}
        over = peaks.cuda_peak if self.device == "cuda" else peaks.host_peak
        return {name: found for name, entry in entries.items() if (found := over(entry.setup, entry.run)) is not None}

    def _info(self, contestant: str) -> dict[str, Any]:
        result, moved = self.result, self.field.moved
        found = {**self.info, "heap": self.heap, "contestant": contestant, "copy_bandwidth": result.bandwidth}
        found |= {"shape": list(self.field.shape), **self.field.extra}
        if moved is not None and contestant != LIMIT:
            speed = moved / sorted(result.seconds[contestant])[len(result.seconds[contestant]) // 2]
            found |= {"bytes": moved, "gbps": round(speed / 1e9, 2), "of_copy": round(speed / result.bandwidth, 3)}
        if contestant in self.peaks:
            found["peak_mib"] = round(self.peaks[contestant] / peaks.MIB, 1)
        return found


def check(
    entries: Mapping[str, Entry], tolerance: float, rewind: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """There is no figure for a wrong answer: everyone's against the first one's. The seconds that each has taken.

    Raises:
        AssertionError: an answer is another one.
    """
    taken = {}
    want: list[Tensor] | None = None
    for name, entry in entries.items():
        if not entry.compared:
            continue
        rewind()
        start = time.perf_counter()
        entry.setup()
        found = tensors((entry.answer or entry.run)())
        taken[name] = time.perf_counter() - start
        if want is None:
            want = [one.detach().clone() for one in found]
        assert len(found) == len(want) > 0, f"{name} gives {len(found)} answers, and the first {len(want)}"
        for index, (one, right) in enumerate(zip(found, want, strict=True)):
            close = one.shape == right.shape and (
                relative_error(one, right) <= tolerance or float((one - right).norm()) <= 1e-7 * right.numel() ** 0.5
            )
            assert close, f"{name}: answer {index} is not the first contestant's"
    return taken


def tensors(answer: object) -> list[Tensor]:
    """One, or several."""
    if isinstance(answer, Tensor):
        return [answer]
    assert isinstance(answer, Iterable)
    return [one for one in answer if isinstance(one, Tensor)]
