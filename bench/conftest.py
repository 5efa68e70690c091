"""Options, and what all benchmarks share. Heap and threads must be set before a process starts: see `bench.machine`."""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch

from bench import machine
from bench.race import Copy
from bench.workloads import SIZES, Size


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=tuple(SIZES), default="minilm", help="tiny: seconds, to see that all works")
    parser.addoption("--heap", choices=("users", "retained"), default="users", help="glibc's heap: as it is, or kept")
    parser.addoption("--threads", type=int, default=2, help="threads of torch and of the native ops")
    parser.addoption("--rounds", type=int, default=0, help="rounds of every race, instead of its own number")


def pytest_configure(config: pytest.Config) -> None:
    """Start again in the environment that the options ask for, unless this is it."""
    heap, threads = config.getoption("--heap"), config.getoption("--threads")
    wanted = machine.environment(heap, threads, os.environ)
    if wanted != dict(os.environ):
        capture = config.pluginmanager.getplugin("capturemanager")
        if capture is not None:
            capture.suspend_global_capture(in_=True)  # or the new process would write into this one's files
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, wanted)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def size(request: pytest.FixtureRequest) -> Size:
    return SIZES[request.config.getoption("--size")]


@pytest.fixture(scope="session")
def info(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The machine, for `extra_info`."""
    return {"size": request.config.getoption("--size"), **machine.describe(request.config.getoption("--heap"))}


@pytest.fixture(scope="session")
def copy(size: Size) -> Copy:
    return Copy(size.copy)


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> Any:
    """How many rounds a race has, of those that it would like."""
    asked = request.config.getoption("--rounds")
    disabled = request.config.getoption("benchmark_disable")
    return lambda wanted: asked or (1 if disabled else wanted)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Vocabularies follow from the size."""
    if "vocabulary" in metafunc.fixturenames:
        vocabularies = SIZES[metafunc.config.getoption("--size")].vocabularies
        metafunc.parametrize("vocabulary", vocabularies, scope="module")
