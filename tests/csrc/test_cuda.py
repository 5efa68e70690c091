"""rows and grads on a GPU: the bits that the CPU copies, the numbers that it computes; streams, graphs, guard rows."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments.rule import BALLS, DIRECTIONS
from fastadv.native.flags import check
from fastadv.native.grads import grads_accumulate, grads_average, grads_copy
from fastadv.native.rows import rows_back_up, rows_restore
from fastadv.native.rows import rows_step as native_rows_step
from fastadv.ops.grads import Backup, Plan
from tests.flat import row_steps
from tests.support import same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(native.cuda_reason() is not None, reason=f"no CUDA ops: {native.cuda_reason()}"),
]

rows_step = row_steps(native_rows_step)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DIMS = [1, 33, 768, 1025]
GUARD = 77.0


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def tables(dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU, on the GPU with rows that lie apart between guards, and the memory of that."""
    table = randn(37, dim, dtype=dtype)
    room = torch.full((41, dim + 3), GUARD, dtype=dtype, device="cuda")
    on_device = room[2:-2, 1 : dim + 1]
    on_device.copy_(table)
    return table, on_device, room


def untouched(room: Tensor) -> bool:
    edges = (room[:2], room[-2:], room[:, :1], room[:, -2:])
    return all(bool((edge == GUARD).all()) for edge in edges)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("some", [True, False])
def test_rows_are_kept_and_put_back_bit_for_bit(some: bool, dim: int, dtype: torch.dtype) -> None:
    table, on_device, room = tables(dim, dtype)
    table[3], on_device[3] = math.nan, math.nan
    rows = torch.tensor([0, 3, 4, 36]) if some else None
    saved = rows_back_up(on_device, None if rows is None else rows.cuda())
    assert same_bits(saved.cpu(), rows_back_up(table, rows))
    version = on_device._version
    on_device.fill_(5)
    rows_restore(on_device, saved, None if rows is None else rows.cuda())
    assert on_device._version > version + 1
    want = torch.full_like(table, 5)
    rows_restore(want, saved.cpu(), rows)
    assert same_bits(on_device.cpu(), want)
    assert untouched(room)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_two_steps(dim: int, dtype: torch.dtype) -> None:
    """Like the CPU's, the same bits each time, and nothing beside the table."""
    for direction, ball, group, rows in itertools.product(DIRECTIONS, BALLS, (0, 1), (torch.tensor([0, 3, 36]), None)):
        rule = (0.3, 0.2, direction, ball, group)
        table, on_device, room = tables(dim, dtype)
        grad, saved, skipped = randn(37, dim, dtype=dtype), rows_back_up(table, rows), torch.tensor(0)
        if group:
            grad[3, 0] = math.nan
        there = [grad.cuda(), saved.cuda(), None if rows is None else rows.cuda(), skipped.cuda()]
        again = on_device.clone()
        for _ in range(2):
            rows_step(table, grad, saved, rows, skipped, *rule)
            rows_step(on_device, *there, *rule)
        assert int(there[3]) == int(skipped) == 2 * group
        error = (on_device.cpu().double() - table.double()).norm() / table.double().norm()
        assert error <= TOLERANCE[dtype], (direction, ball, group, rows)
        assert untouched(room)
        for _ in range(2):
            rows_step(again, *there, *rule)
        assert same_bits(again, on_device)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_groups_without_a_gradient_keep_every_bit(bad: float, group: int) -> None:
    table = randn(5, 40, dtype=torch.bfloat16).cuda()
    before, grad, skipped = table.clone(), torch.zeros_like(table), torch.tensor(0, device="cuda")
    grad[2, 3] = bad
    rows_step(table, grad, before, None, skipped, 0.3, 1e-3, "l2", "l2", group)
    assert same_bits(table, before)
    assert int(skipped) == (bad != 0)


def test_rows_out_of_range_are_left_out_and_told() -> None:
    table, rows = torch.ones(5, 3, device="cuda"), torch.tensor([1, 9], device="cuda")
    saved = rows_back_up(table, rows)
    assert saved[0].tolist() == [1, 1, 1]
    with pytest.raises(IndexError, match="out of range"):
        check(table.device)
    rows_step(table, torch.ones_like(table), None, rows, torch.tensor(0, device="cuda"), 1.0, None, "sign", "none", 0)
    assert table.sum(dim=1).tolist() == [3, 6, 3, 3, 3]
    with pytest.raises(IndexError, match="out of range"):
        check(table.device)


def gradients() -> list[Tensor]:
    """Of all dtypes and sizes, aligned and not, long enough for several chunks."""
    sizes = (1, 7, 40_000, 16_384, 0)
    return [
        randn(size + 1, dtype=dtype)[shift : shift + size] for dtype in DTYPES for size in sizes for shift in (0, 1)
    ]


@pytest.mark.parametrize("what", ["copy", "accumulate", "average"])
def test_gradients_of_all_tensors_in_one_launch(what: str) -> None:
    into, sources = gradients(), gradients()
    rooms = [torch.full((len(one) + 4,), GUARD, dtype=one.dtype, device="cuda") for one in into]
    on_device = [room[2:-2].copy_(one) for room, one in zip(rooms, into, strict=True)]
    others = [one.cuda() for one in sources]
    numbers = {"copy": (), "accumulate": (0.3,), "average": (0.9,)}[what]
    run = {"copy": grads_copy, "accumulate": grads_accumulate, "average": grads_average}[what]
    run(into, sources, *numbers)  # type: ignore[operator]
    run(on_device, others, *numbers)  # type: ignore[operator]
    for room, got, want in zip(rooms, on_device, into, strict=True):
        error = float((got.cpu().double() - want.double()).norm())
        assert same_bits(got.cpu(), want) if what == "copy" else error <= TOLERANCE[got.dtype] * 200
        assert bool((room[:2] == GUARD).all() and (room[-2:] == GUARD).all())


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
