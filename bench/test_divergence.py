"""The symmetric KL divergence of two batches of logits, with its gradient by both: time, caches cold, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from bench.divergences import CONTESTANTS, inputs, moved
from bench.memory import MIB
from bench.race import LIMIT, Copy, Entry, Result, race, relative_error, replay_clock, report
from bench.workloads import Size

ROOT = Path(__file__).parent.parent
SHAPES = {"minilm": [(32, 2), (32, 1_000), (256, 30_522), (32, 250_002)], "tiny": [(8, 2), (8, 300)]}

cached: dict[tuple[int, int], Result] = {}
peaks: dict[str, dict[str, Any]] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Shapes follow from the size."""
    if "shape" in metafunc.fixturenames:
        shapes = SHAPES[metafunc.config.getoption("--size")]
        metafunc.parametrize("shape", shapes, ids=str, scope="module")


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("contestant", [*CONTESTANTS, LIMIT])
def test_divergence(
    benchmark: Any,
    shape: tuple[int, int],
    contestant: str,
    copy: Copy,
    rounds: Callable[[int], int],
    info: dict[str, Any],
) -> None:
    if shape not in cached:
        torch._dynamo.reset()
        logits, target = inputs(*shape)
        want = CONTESTANTS["plain PyTorch"](logits.double(), target.double())
        for name, compare in CONTESTANTS.items():
            for found, right in zip(compare(logits, target), want, strict=True):
                assert relative_error(found, right) <= 1e-4, name
        entries = {
            name: Entry(lambda: None, lambda compare=compare: compare(logits, target))
            for name, compare in CONTESTANTS.items()
        }
        cached[shape] = race(entries, rounds(21), copy).with_limit(moved(*shape))
    result = cached[shape]
    found = {**info, "contestant": contestant, "copy_bandwidth": result.bandwidth}
    group = f"symmetric KL and gradients, {shape[0]} x {shape[1]:,} logits"
    report(benchmark, group, result.seconds[contestant], found)


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, rounds: Callable[[int], int]) -> dict[str, dict[str, Any]]:
    """Every contestant's memory on the largest shape, in a process of its own."""
    if request.config.getoption("--heap") != "users":
        pytest.skip("peak memory means glibc's heap as users have it")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux: /proc/self/clear_refs resets the peak")
    rows, classes = SHAPES[request.config.getoption("--size")][-1]
    shape = ["--rows", str(rows), "--classes", str(classes), "--rounds", str(rounds(3))]
    found = {}
    for name in CONTESTANTS:
        command = [sys.executable, "-m", "bench.divergences", name, *shape]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)
    return found


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_memory(
    benchmark: Any, contestant: str, size: Size, measured: dict[str, dict[str, Any]], info: dict[str, Any]
) -> None:
    """Over what is there before: the results are two tensors like the logits."""
    del size
    rows, classes = SHAPES[info["size"]][-1]
    over = median(measured[contestant]["peaks"])
    found = {
        "contestant": contestant,
        "over_inputs_mib": round(over / MIB, 1),
        "over_inputs_logits": round(over / (4 * rows * classes), 2),
    }
    group = f"peak memory, symmetric KL, {rows} x {classes:,} logits"
    report(benchmark, group, measured[contestant]["seconds"], {**info, **found})
