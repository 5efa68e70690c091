"""One step of a perturbation per position: along the gradient, onto the ball; and from there to the next embedding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import vector_norm

from bench import attack_steps, cases
from bench.attack_steps import Ball
from bench.cases import RULE, Workload
from bench.contest import Field
from bench.race import LIMIT, Entry
from bench.workloads import Size, gradient, table, zipf

CONTESTANTS = ("reference", "torch", "compiled", "fused", LIMIT)
STEPS: dict[str, Any] = {
    "torch": attack_steps.BestSampleStep,
    "compiled": attack_steps.CompiledSampleStep,
    "fused": attack_steps.FusedSampleStep,
}
DIMS = {"batch": (0, 1, 2), "sample": (1, 2), "token": (2,)}


def _formula(delta: Tensor, grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    moved = delta + RULE["step_size"] * grad / vector_norm(grad, dim=dims, keepdim=True)
    return moved * (RULE["epsilon"] / vector_norm(moved, dim=dims, keepdim=True)).clamp(max=1)


_compiled = torch.compile(_formula, dynamic=False)


def ascent(shape: Any, scope: str, device: str) -> Field:
    """`reference`: the formula; `torch`: in place, each step and ball a factor."""
    work, dims = Workload(shape, device), DIMS[scope]
    delta = work.start.clone()

    def norm(x: Tensor) -> Tensor:
        return vector_norm(x, dim=dims, keepdim=True)

    def in_place() -> Tensor:
        delta.addcmul_(work.grad, RULE["step_size"] / norm(work.grad))
        return delta.mul_((RULE["epsilon"] / norm(delta)).clamp_(max=1))

    def reset() -> None:
        delta.copy_(work.start)
        work.rotate()

    case = cases.ascend(scope, embeds=False)(work)
    entries = {
        "reference": Entry(reset, lambda: _formula(delta, work.grad, dims)),
        "torch": Entry(reset, in_place),
        "compiled": Entry(reset, lambda: _compiled(delta, work.grad, dims)),
        "fused": case.entry(),
    }
    return Field(entries, case.moved, shape, rewind=work.rewind)


def attack_step(shape: Any, device: str) -> Field:
    """Sample scope: from dE to the next forward's E, the second step."""
    ids = zipf(shape.batch, shape.length, shape.vocabulary).to(device)
    weight = table(shape.vocabulary, shape.dimension, device)
    grads = [gradient(*ids.shape, shape.dimension, device=device, seed=seed) for seed in (2, 3)]
    made = {name: build(weight, ids, Ball(0.3, 0.2)) for name, build in STEPS.items()}
    moved = 4 * shape.dimension * (4 * ids.numel() + len(ids.unique()))  # dE, W's rows, delta twice, E
    return Field(attack_steps.entries(made, weight[ids], *grads), moved, shape)


@pytest.mark.models("BERT-base")
@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("scope", DIMS)
def test_ascend(contest: Any, size: Size, device: str, model: str, scope: str, contestant: str) -> None:
    contest(f"ascend, {scope} scope, {model}", contestant, lambda: ascent(size.shapes[model], scope, device))


@pytest.mark.parametrize("contestant", [*STEPS, LIMIT])
def test_attack_step(contest: Any, size: Size, device: str, model: str, contestant: str) -> None:
    make = lambda: attack_step(size.shapes[model], device)  # noqa: E731
    contest(f"attack step, sample scope, {model}", contestant, make, rounds=21)
