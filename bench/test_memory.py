"""Peak resident memory, each contestant in a process of its own: a PGD-3 step, and a divergence."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest

from bench import divergences, memory, processes
from bench.contest import Contests
from bench.peaks import MIB
from bench.race import report
from bench.workloads import Size

pytestmark = [pytest.mark.steps, pytest.mark.once]
ROUNDS = 1  # each after a run that warms up; they agree to a MiB


@pytest.fixture(scope="module")
def steps(request: pytest.FixtureRequest, contests: Contests) -> dict[str, dict[str, Any]]:
    options = ["--size", request.config.getoption("--size"), "--rounds", contests.rounds or ROUNDS]
    return processes.each("bench.memory", memory.CONTESTANTS, *options)


@pytest.fixture(scope="module")
def comparisons(size: Size, contests: Contests) -> dict[str, dict[str, Any]]:
    rows, classes = size.logits[-1]
    options = ["--rows", rows, "--classes", classes, "--rounds", contests.rounds or ROUNDS]
    return processes.each("bench.divergences", divergences.CONTESTANTS, *options)


@pytest.mark.parametrize("contestant", memory.CONTESTANTS)
def test_training_step(
    benchmark: Any, heap: str, contestant: str, size: Size, steps: dict[str, dict[str, Any]], contests: Contests
) -> None:
    """Over plain training."""
    peak = median(steps[contestant]["peaks"])
    over = peak - median(steps["plain"]["peaks"])
    found = {
        "peak_mib": round(peak / MIB, 1),
        "over_plain_mib": round(over / MIB, 1),
        "over_plain_perturbations": round(over / memory.perturbation_bytes(size), 1),
    }
    group = f"peak memory, PGD-3, V {size.vocabularies[-1]:,}"
    info = {**contests.info, "heap": heap, "contestant": contestant}
    report(benchmark, group, steps[contestant]["seconds"], {**info, **found})


@pytest.mark.parametrize("contestant", divergences.CONTESTANTS)
def test_divergence(
    benchmark: Any, heap: str, contestant: str, size: Size, comparisons: dict[str, dict[str, Any]], contests: Contests
) -> None:
    """Over what is there before: the results are two tensors like the logits."""
    rows, classes = size.logits[-1]
    over = median(comparisons[contestant]["peaks"])
    found = {"over_inputs_mib": round(over / MIB, 1), "over_inputs_logits": round(over / (4 * rows * classes), 2)}
    group = f"peak memory, symmetric KL, {rows} x {classes:,} logits"
    info = {**contests.info, "heap": heap, "contestant": contestant}
    report(benchmark, group, comparisons[contestant]["seconds"], {**info, **found})
