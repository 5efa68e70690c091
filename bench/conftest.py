"""Options, and what all benchmarks share: how a contest is run, and which heap it is run with.

Threads must be set before a process starts, and a heap that somebody tuned must be gone: see `pytest_configure`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from bench import machine
from bench.contest import Contests
from bench.race import Copy, replay_clock
from bench.workloads import MAIN, MODELS, SIZES, Size

HEAPS = ("users", "retained")
QUICK = 9  # rounds of every race with `-m quick`


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=tuple(SIZES), default="full", help="tiny: seconds, to see that all works")
    parser.addoption("--heap", choices=("both", *HEAPS), default="both", help="glibc's heap: as users have it, or kept")
    parser.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch and of the native ops")
    parser.addoption("--rounds", type=int, default=0, help="rounds of every race, instead of its own number")
    parser.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU, if there is one")


def pytest_configure(config: pytest.Config) -> None:
    """Start again in the environment that the options ask for, unless this is it."""
    threads = config.getoption("--threads")
    wanted = machine.environment(threads, os.environ)
    if wanted != dict(os.environ):
        capture = config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)  # or the new process would write into this one's files
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, wanted)
    torch.set_num_threads(threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Heaps and models follow from the options and from a test's marks."""
    config, marked = metafunc.config, metafunc.definition.get_closest_marker
    heap = config.getoption("--heap")
    heaps = [one for one in HEAPS if heap in ("both", one)] if _device(config) == "cpu" else ["users"]
    heaps = [one for one in heaps if one == "users" or not marked("once")] or [pytest.param("", marks=pytest.mark.skip)]
    metafunc.fixturenames.append("heap")
    metafunc.parametrize("heap", heaps)
    if "model" in metafunc.fixturenames:
        chosen = marked("models")
        metafunc.parametrize("model", chosen.args if chosen else tuple(MODELS))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The users' heap comes first, for there is no way back; it alone sees the models beside the main ones."""
    dropped = []
    for item in items:
        values = item.callspec.params  # type: ignore[attr-defined]
        heap, model = values["heap"], values.get("model", MAIN[0])
        item.add_marker(pytest.mark.benchmark(timer=replay_clock))
        if heap == "users" and model == MAIN[0] and not item.get_closest_marker("steps"):
            item.add_marker(pytest.mark.quick)
        if heap == "retained" and model not in MAIN:
            dropped.append(item)
    items[:] = [item for item in items if item not in dropped]
    items.sort(key=lambda item: item.callspec.params["heap"] == "retained")  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=dropped)


def _device(config: pytest.Config) -> str:
    device: str = config.getoption("--device")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return _device(request.config)


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    return SIZES[request.config.getoption("--size")]


@pytest.fixture(scope="session")
def contests(request: pytest.FixtureRequest, size: Size, device: str) -> Contests:
    option = request.config.getoption
    rounds = option("--rounds") or (1 if option("benchmark_disable") else 0)
    rounds = rounds or (QUICK if option("markexpr") == "quick" else 0)
    info = {"size": option("--size"), **machine.describe(device)}
    return Contests(Copy(size.copy, device), rounds, info, device)


@pytest.fixture
def contest(contests: Contests, benchmark: Any, heap: str) -> Any:
    """`contest(group, contestant, make)`: see `Contests.enter`."""
    contests.use(heap)
    return lambda *arguments, **options: contests.enter(benchmark, *arguments, **options)
