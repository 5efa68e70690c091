"""rows and grads on a GPU: what device_checks.py wants of any device; and graphs, and no waiting."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastadv import native
from fastadv.ops.grads import Backup, Plan
from tests.csrc import device_checks
from tests.csrc.device_checks import DIMS, DTYPES, LAYOUTS, RULES, rows_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.cuda_reason() is not None, reason=f"no CUDA ops: {native.cuda_reason()}"),
]


def put(tensor: Tensor) -> Tensor:
    return tensor.to("cuda", copy=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_kept_and_put_back(layout: str, some: bool, dim: int, dtype: torch.dtype) -> None:
    device_checks.keeps_and_puts_back(put, dtype, dim, some, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_two_steps(dim: int, dtype: torch.dtype) -> None:
    for rule, some, layout in itertools.product(RULES, (True, False), LAYOUTS):
        device_checks.steps_twice(put, dtype, dim, rule, some, layout)


@pytest.mark.parametrize("ball", ["l2", "unit"])
def test_two_steps_of_more_rows_than_there_are_blocks(ball: str) -> None:
    device_checks.steps_twice(put, torch.bfloat16, 5, ("max", ball, 0), False, "aligned", count=2500)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_groups_without_a_gradient_keep_every_bit(bad: float, group: int) -> None:
    device_checks.keeps_every_bit_without_a_gradient(put, torch.bfloat16, bad, group)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("outside", [-2, -1, 5, 6])
def test_rows_out_of_range_are_left_out_and_told(outside: int, group: int) -> None:
    device_checks.leaves_out_what_is_out_of_range(put, outside, group)


def test_nothing() -> None:
    device_checks.does_nothing_to_nothing(put)


@pytest.mark.parametrize("what", ["copy", "accumulate", "average"])
def test_gradients_of_all_tensors_in_one_launch(what: str) -> None:
    device_checks.takes_gradients_in_one_launch(put, what, DTYPES)


def test_a_plan_and_a_step_are_captured() -> None:
    into = [torch.zeros(1000, device="cuda"), torch.zeros(3, device="cuda", dtype=torch.bfloat16)]
    sources = [torch.ones_like(one) for one in into]
    plan, table = Plan(into, sources, fused=True), torch.zeros(50, 64, device="cuda")
    grad, skipped = torch.ones_like(table), torch.tensor(0, device="cuda")

    def step() -> None:
        plan.accumulate(1.0)
        rows_step(table, grad, None, None, skipped, 0.1, None, "sign", "none", 0)

    step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert [one.unique().tolist() for one in into] == [[4.0], [4.0]]
    assert torch.allclose(table, torch.full_like(table, 0.4))


def test_nothing_waits_for_the_device() -> None:
    layer = torch.nn.Linear(64, 64).cuda()
    layer(torch.ones(2, 64, device="cuda")).sum().backward()
    backup = Backup(list(layer.parameters()), fused=True)
    backup.save()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for parameter in layer.parameters():
            parameter.grad = torch.empty_like(parameter)  # elsewhere: the plan is made anew
        backup.save()
        backup.restore()
    finally:
        torch.cuda.set_sync_debug_mode("default")
