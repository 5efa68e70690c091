"""Options, and what the benchmarks share: the contests of a session, and which heap they are run with.

Threads must be set before a process starts, and a heap that somebody tuned must be gone: see `pytest_configure`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from bench import machine, memory
from bench.cases import cases, group
from bench.contest import Case, Field, contest
from bench.race import LIMIT, Copy, Result
from bench.workloads import SIZES

HEAPS = ("users", "retained")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=("full", "tiny"), default="full", help="tiny: seconds, to see that all works")
    parser.addoption("--heap", choices=("both", *HEAPS), default="both", help="glibc's heap: as users have it, or kept")
    parser.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch and of the native ops")
    parser.addoption("--rounds", type=int, default=0, help="rounds of every race, instead of its own number")
    parser.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, if there is one")


def pytest_configure(config: pytest.Config) -> None:
    """Start again in the environment that the options ask for, unless this is it."""
    wanted = machine.environment(config.getoption("--threads"), os.environ)
    if wanted != dict(os.environ):
        capture = config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)  # or the new process would write into this one's files
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, wanted)
    torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each contestant of each case and heap; the users' heap comes first, for there is no way back."""
    size, heap = SIZES[metafunc.config.getoption("--size")], metafunc.config.getoption("--heap")
    if "weighed" in metafunc.fixturenames:
        metafunc.parametrize(("weighed", "contestant"), memory.contestants(size) if heap != "retained" else [])
        return
    found, device = [], _device(metafunc.config)
    for one in (one for one in HEAPS if heap in ("both", one) and (one == "users" or device == "cpu")):
        for name, case in cases(size, device).items():
            marks = [pytest.mark.quick] if case.quick and one == "users" else []
            found += [
                pytest.param(one, group(name), case, who, marks=marks, id=f"{one}-{machine.slug(name)}-{who}")
                for who in case.contestants
                if one == "users" or case.retained
            ]
    metafunc.parametrize(("heap", "group", "case", "contestant"), found)


def _device(config: pytest.Config) -> str:
    device: str = config.getoption("--device")
    return device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


class Contests:
    """The contests of a session: each is held when its first contestant is asked for."""

    def __init__(self, config: pytest.Config) -> None:
        option = config.getoption
        quick = 9 if option("markexpr") == "quick" else 0
        self.size, self.device = SIZES[option("--size")], _device(config)
        self.rounds = option("--rounds") or (1 if option("benchmark_disable") else quick)
        self.info = {"size": option("--size"), **machine.describe(self.device)}
        self.copy, self.heap = Copy(self.size.copy, self.device), "users"
        self.held: tuple[str, str] | None = None  # what it was made of is forgotten with the next
        self.field, self.result, self.peaks = Field({}), Result({}, [], 0), dict[str, int]()

    def find(self, heap: str, group: str, case: Case, contestant: str) -> tuple[list[float], dict[str, Any]]:
        """One contestant's rounds, and what stands beside them."""
        if heap != self.heap:
            assert heap == "retained", "what was freed is kept: benchmarks on the users' heap must come first"
            if not machine.retain_heap():
                pytest.skip("no glibc: there is one heap")
            self.heap = heap
        if self.held != (group, heap):
            self._hold(case)
            self.held = (group, heap)
        if contestant not in self.result.seconds:
            pytest.skip(f"{contestant} takes no part here: it is not installed (the extra `bench`), or memory is short")
        found = {**self.info, "heap": heap, "contestant": contestant, "copy_bandwidth": self.result.bandwidth}
        found |= {"shape": list(self.field.shape), **case.extra}
        if self.field.moved is not None and contestant != LIMIT:
            found |= self.result.speed(contestant, self.field.moved)
        if contestant in self.peaks:
            found["peak_mib"] = round(self.peaks[contestant] / memory.MIB, 1)
        return self.result.seconds[contestant], found

    def _hold(self, case: Case) -> None:
        self.held, self.field = None, Field({})
        torch._dynamo.reset()
        self.field = case.make()
        rounds = self.rounds or (case.rounds if self.heap == "users" else case.retained)
        warmup = min(case.warmup, self.rounds or case.warmup)
        self.result = contest(self.field, rounds, self.copy, warmup=warmup, budget=case.budget)
        shown = self.field.weighed and (self.device == "cuda" or self.heap == "users")
        self.peaks = memory.peaks(self.field.entries, self.device) if shown else {}


@pytest.fixture(scope="session")
def contests(request: pytest.FixtureRequest) -> Contests:
    return Contests(request.config)


replayed = [0.0]  # what pytest-benchmark's timer reads: the time that a race's rounds have let pass


def _pass(seconds: float) -> None:
    replayed[0] += seconds


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=lambda: replayed[0]))


@pytest.fixture
def show(benchmark: Any) -> Any:
    """`show(group, seconds, info)` enters rounds that a race has timed as the benchmark's own."""

    def enter(group: str, seconds: list[float], info: dict[str, Any]) -> None:
        rounds = iter(seconds)
        benchmark.group = group
        benchmark.extra_info.update(info)
        benchmark.pedantic(_pass, setup=lambda: ((next(rounds),), {}), rounds=len(seconds))

    return enter
