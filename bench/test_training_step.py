"""One training step: plain, with the classic script, with the best plain PyTorch, and with fastadv."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import contestants as who
from bench.check import same_gradients
from bench.race import Copy, Entry, Result, race, replay_clock, report
from bench.workloads import Size, classifier, loss_closure

CONTESTANTS = ("plain", "classic script", "plain, index_add", "plain PyTorch", "fastadv")
WORK = ("FGM", "PGD-3", "PGD-3 and AdamW")
ROUNDS = 7


@pytest.fixture(scope="module")
def results(vocabulary: int, size: Size, copy: Copy, rounds: Callable[[int], int]) -> Callable[[str], Result]:
    """The races of one model, each run when it is first asked for."""
    model = classifier(size.model, vocabulary)
    closure = loss_closure(model, size, vocabulary)
    found: dict[str, Result] = {}

    def result(work: str) -> Result:
        if work not in found:
            found[work] = training_race(work, model, closure, rounds(ROUNDS), copy)
        return found[work]

    return result


def training_race(work: str, model: nn.Module, closure: Callable[[], Tensor], rounds: int, copy: Copy) -> Result:
    """Check that all find the same gradients, then time them; the optimizer, where there is one, is the same."""
    method, _, optimized = work.partition(" and ")
    steps = {name: who.training(name, method, model, closure) for name in CONTESTANTS}
    same_gradients(model, steps["classic script"], {name: steps[name] for name in CONTESTANTS[2:]}, 1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True) if optimized else None

    def entry(step: Callable[[], object]) -> Entry:
        if optimizer is None:
            return Entry(model.zero_grad, step)
        return Entry(model.zero_grad, lambda: (step(), optimizer.step()))

    result = race({name: entry(step) for name, step in steps.items()}, rounds, copy)
    model.zero_grad()
    gc.collect()
    return result


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("work", WORK)
def test_training_step(
    benchmark: Any,
    vocabulary: int,
    work: str,
    contestant: str,
    results: Callable[[str], Result],
    info: dict[str, Any],
) -> None:
    result = results(work)
    found = {**info, "contestant": contestant, "copy_bandwidth": result.bandwidth}
    report(benchmark, f"training step, {work}, V {vocabulary:,}", result.seconds[contestant], found)
