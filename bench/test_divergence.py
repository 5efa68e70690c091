"""The symmetric KL divergence of two batches of logits, with its gradient by both, through autograd."""

from __future__ import annotations

from typing import Any

import pytest

from bench.contest import Field
from bench.divergences import CONTESTANTS, inputs, moved
from bench.race import LIMIT, Entry
from bench.workloads import SIZES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Shapes follow from the size."""
    logits = SIZES[metafunc.config.getoption("--size")].logits
    metafunc.parametrize("shape", logits, ids=lambda shape: f"{shape[0]}x{shape[1]}")


def field(shape: tuple[int, int], device: str) -> Field:
    logits, target = (one.to(device) for one in inputs(*shape))
    entries = {
        name: Entry(lambda: None, lambda compare=compare: compare(logits, target))
        for name, compare in CONTESTANTS.items()
    }
    return Field(entries, moved(*shape), shape)


@pytest.mark.parametrize("contestant", [*CONTESTANTS, LIMIT])
def test_divergence(contest: Any, device: str, shape: tuple[int, int], contestant: str) -> None:
    contest(f"symmetric KL and gradients, {shape[0]} x {shape[1]:,} logits", contestant, lambda: field(shape, device))
