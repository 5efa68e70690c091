"""An attack step in table scope: from dE, the gradient at the embedding's output, to the next forward's E."""

from __future__ import annotations

from typing import Any

import pytest

from bench import attack_steps
from bench.attack_steps import Ball
from bench.contest import Field
from bench.race import LIMIT
from bench.workloads import Shape, Size, gradient, table, zipf

STEPS: dict[str, Any] = {
    "reference": attack_steps.ClassicStep,
    "torch, index_add": attack_steps.IndexAddStep,
    "torch": attack_steps.BestStep,
    "compiled": attack_steps.CompiledStep,
    "fused": attack_steps.FusedStep,
}
PROJECTED, INSIDE = Ball(0.3, 0.2), Ball(0.3, 1e6)
LARGEST = 1 << 30  # bytes of a table that the script still moves here: beyond, it takes 8 s a step, and six tables more


def attack_step(shape: Shape, ball: Ball, device: str) -> Field:
    """The second of two steps; without the script on the largest table."""
    ids = zipf(shape.batch, shape.length, shape.vocabulary).to(device)
    weight = table(shape.vocabulary, shape.dimension, device)
    grads = [gradient(ids.numel(), shape.dimension, device=device, seed=seed) for seed in (2, 3)]
    fits = device != "cpu" or 4 * weight.numel() < LARGEST
    made = {name: build(weight, ids, ball) for name, build in STEPS.items() if fits or name != "reference"}
    moved = 4 * shape.dimension * (2 * ids.numel() + 3 * len(ids.unique()))  # dE, W's rows, r twice, E
    return Field(attack_steps.entries(made, weight[ids.flatten()], *grads), moved, shape)


@pytest.mark.parametrize("contestant", [*STEPS, LIMIT])
def test_projected(contest: Any, size: Size, device: str, model: str, contestant: str) -> None:
    """The second step leaves the ball, and is projected."""
    make = lambda: attack_step(size.shapes[model], PROJECTED, device)  # noqa: E731
    contest(f"attack step, table scope, {model}", contestant, make, rounds=21)


@pytest.mark.models("BERT-base")
@pytest.mark.parametrize("contestant", [*STEPS, LIMIT])
def test_inside(contest: Any, size: Size, device: str, model: str, contestant: str) -> None:
    """What the projection costs."""
    make = lambda: attack_step(size.shapes[model], INSIDE, device)  # noqa: E731
    contest(f"attack step, table scope, {model}, inside the ball", contestant, make, rounds=21)
