"""One training step of each method, without its optimizer.

`test_training_step`: PGD-3 in table scope at full size, with both vocabularies; there `reference` is the script that
everybody copies. `test_methods`: every method on half of that batch. Plain training is beside each, for scale.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import steps, training
from bench.contest import Field
from bench.workloads import Size, classifier, inputs, loss_closure

pytestmark = [
    pytest.mark.steps,
    pytest.mark.filterwarnings("ignore:FreeAT"),  # no optimizer steps between replays: they are not timed
]
TRAINING = ("plain", "reference", "torch", "fused")


def pgd(size: Size, vocabulary: int, device: str) -> Field:
    """Full size; every contestant's gradients must be the script's."""
    model = classifier(size.network, vocabulary, device)
    closure = loss_closure(model, inputs(*size.batch, vocabulary, device))
    made = {name: training.step(name, "PGD-3", model, closure) for name in TRAINING}
    return training.field(model, made, (*size.batch, vocabulary, size.network[0]))


@pytest.mark.parametrize("contestant", TRAINING)
@pytest.mark.parametrize("table", [0, 1])
def test_training_step(contest: Any, heap: str, size: Size, device: str, table: int, contestant: str) -> None:
    vocabulary = size.vocabularies[table]
    make = lambda: pgd(size, vocabulary, device)  # noqa: E731
    rounds = 7 if heap == "users" else 2
    contest(f"training step, PGD-3, V {vocabulary:,}", contestant, make, rounds=rounds, warmup=0, budget=90)


@pytest.mark.once
@pytest.mark.parametrize(("work", "contestant"), [(work, name) for work, names in steps.WORK.items() for name in names])
def test_methods(contest: Any, size: Size, device: str, work: str, contestant: str) -> None:
    contest(f"step of a method, {work}", contestant, lambda: steps.field(work, size, device), rounds=5, warmup=0)


@pytest.mark.once
@pytest.mark.parametrize("contestant", ["plain", "compiled", "fused"])
def test_compiled_model(contest: Any, size: Size, device: str, contestant: str) -> None:
    """PGD-3 of a model under torch.compile. `compiled`: the schedule by hand; its probes compute all gradients."""
    make = lambda: compiled(size, device)  # noqa: E731
    contest("training step, PGD-3, a compiled model", contestant, make, rounds=5, warmup=1)


def compiled(size: Size, device: str) -> Field:
    """Two layers of the network: compiling takes longer than running."""
    vocabulary, (hidden, _, heads, inner) = size.vocabularies[0], size.network
    model = classifier((hidden, 2, heads, inner), vocabulary, device)
    batch = inputs(*size.small, vocabulary, device)
    runs: dict[str, Any] = {"plain": torch.compile(model), "compiled": torch.compile(model)}
    made = {
        "plain": training.step("plain", "PGD-3", model, loss_closure(runs["plain"], batch)),
        "compiled": training.step("torch, index_add", "PGD-3", model, loss_closure(runs["compiled"], batch)),
        "fused": training.compiled_step("PGD-3", model, batch),
    }
    return training.field(model, made, (*size.small, vocabulary, hidden), tolerance=1e-3)
