"""Peak resident memory of a PGD-3 step on the largest table, over plain training: numbers, not an assertion."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from bench.memory import CONTESTANTS, MIB, perturbation_bytes
from bench.race import replay_clock, report
from bench.workloads import Size

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, rounds: Callable[[int], int]) -> dict[str, dict[str, Any]]:
    """Every contestant in a process of its own."""
    if request.config.getoption("--heap") != "users":
        pytest.skip("peak memory means glibc's heap as users have it")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux: /proc/self/clear_refs resets the peak")
    options = ["--size", request.config.getoption("--size"), "--rounds", str(rounds(3))]
    return {name: _in_a_process([name, *options]) for name in CONTESTANTS}


def _in_a_process(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.memory", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("contestant", CONTESTANTS)
def test_peak_memory(
    benchmark: Any, contestant: str, size: Size, measured: dict[str, dict[str, Any]], info: dict[str, Any]
) -> None:
    peak = median(measured[contestant]["peaks"])
    over = peak - median(measured["plain"]["peaks"])
    found = {
        "contestant": contestant,
        "peak_mib": round(peak / MIB, 1),
        "over_plain_mib": round(over / MIB, 1),
        "over_plain_perturbations": round(over / perturbation_bytes(size), 1),
    }
    group = f"peak memory, PGD-3, V {size.vocabularies[-1]:,}"
    report(benchmark, group, measured[contestant]["seconds"], {**info, **found})
