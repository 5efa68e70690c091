"""What rows and grads must do on a device: the bits that the CPU copies, the numbers that it computes, and no more.

test_cuda.py runs these checks on a GPU, test_emulated.py on the CPU. `put` copies a tensor to the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv.arguments.rule import BALLS, DIRECTIONS
from fastadv.native.flags import check
from fastadv.native.grads import grads_accumulate, grads_average, grads_copy
from fastadv.native.rows import rows_back_up, rows_restore
from fastadv.native.rows import rows_step as native_rows_step
from tests.flat import row_steps
from tests.support import same_bits

Put = Callable[[Tensor], Tensor]

rows_step = row_steps(native_rows_step)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DIMS = [1, 33, 768, 1025]
RULES = list(itertools.product(DIRECTIONS, BALLS, (0, 1)))  # direction, ball, group
GUARD = 77.0
COUNT = 37  # rows


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def chosen(some: bool, count: int) -> Tensor | None:
    return torch.tensor([0, 3, 4, count - 1]) if some else None


def there(put: Put, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else put(tensor)


def guarded(put: Put, table: Tensor, aligned: bool = False) -> tuple[Tensor, Tensor]:
    """A copy on the device whose rows lie apart between guards, each at a multiple of 16 bytes or not; and all of it."""
    rows, dim = table.shape
    left = 8 if aligned else 1
    width = -(-dim // 8) * 8 + 16 if aligned else dim + 3
    room = put(torch.full((rows + 4, width), GUARD, dtype=table.dtype))
    room[2:-2, left : left + dim] = put(table)
    return room[2:-2, left : left + dim], room


def untouched(room: Tensor, inner: Tensor) -> bool:
    left, dim = inner.storage_offset() - room[2:].storage_offset(), inner.shape[1]
    edges = (room[:2], room[-2:], room[:, :left], room[:, left + dim :])
    return all(bool((edge == GUARD).all()) for edge in edges)


def keeps_and_puts_back(put: Put, dtype: torch.dtype, dim: int, some: bool, aligned: bool) -> None:
    """Bit for bit."""
    table, rows = randn(COUNT, dim, dtype=dtype), chosen(some, COUNT)
    table[3] = math.nan
    on_device, room = guarded(put, table, aligned)
    saved = rows_back_up(on_device, there(put, rows))
    assert same_bits(saved.cpu(), rows_back_up(table, rows))
    version = on_device._version
    on_device.fill_(5)
    rows_restore(on_device, saved, there(put, rows))
    assert on_device._version > version + 1
    want = torch.full_like(table, 5)
    rows_restore(want, saved.cpu(), rows)
    assert same_bits(on_device.cpu(), want)
    assert untouched(room, on_device)


def steps_twice(
    put: Put, dtype: torch.dtype, dim: int, rule: tuple[str, str, int], some: bool, aligned: bool, count: int = COUNT
) -> None:
    """Like the CPU's, the same bits each time however the rows lie, and nothing beside the table."""
    group, numbers, rows = rule[-1], (0.3, 0.2, *rule), chosen(some, count)
    table, grad, skipped = randn(count, dim, dtype=dtype), randn(count, dim, dtype=dtype), torch.tensor(0)
    if group:
        grad[3, 0] = math.nan
    saved = rows_back_up(table, rows)
    on_device, room = guarded(put, table, aligned)
    slope, slope_room = guarded(put, grad, aligned)
    given: list[Any] = [put(saved), there(put, rows), put(skipped)]
    again, close_by = put(table), put(grad)
    for _ in range(2):
        rows_step(table, grad, saved, rows, skipped, *numbers)
        rows_step(on_device, slope, *given, *numbers)
    assert int(given[2]) == int(skipped) == 2 * group
    error = (on_device.cpu().double() - table.double()).norm() / table.double().norm()
    assert error <= TOLERANCE[dtype], (rule, some, float(error))
    assert untouched(room, on_device)
    assert untouched(slope_room, slope)
    for _ in range(2):
        rows_step(again, close_by, *given, *numbers)
    assert same_bits(again.cpu(), on_device.cpu())


def keeps_every_bit_without_a_gradient(put: Put, dtype: torch.dtype, bad: float, group: int) -> None:
    table = put(randn(5, 40, dtype=dtype))
    before, grad, skipped = put(table.cpu()), put(torch.zeros(5, 40, dtype=dtype)), put(torch.tensor(0))
    grad[2, 3] = bad
    rows_step(table, grad, before, None, skipped, 0.3, 1e-3, "l2", "l2", group)
    assert same_bits(table.cpu(), before.cpu())
    assert int(skipped) == (bad != 0)


def leaves_out_what_is_out_of_range(put: Put, outside: int, group: int) -> None:
    """A row before the table or behind it; `told` raises once for every launch."""
    table, room = guarded(put, torch.ones(5, 3))
    rows = put(torch.tensor(sorted([1, outside])))
    at = int(outside < 1)
    saved = rows_back_up(table, rows)
    assert saved[at].tolist() == [1, 1, 1]
    told(table)
    rows_step(table, put(torch.ones(5, 3)), None, rows, put(torch.tensor(0)), 1.0, None, "sign", "none", group)
    assert table.sum(dim=1).tolist() == [3, 6, 3, 3, 3]
    told(table)
    rows_restore(table, put(torch.full((2, 3), 9.0)), rows)
    assert table.sum(dim=1).tolist() == [3, 27, 3, 3, 3]
    told(table)
    assert untouched(room, table)


def told(table: Tensor) -> None:
    with pytest.raises(IndexError, match="out of range"):
        check(table.device)
    check(table.device)


def gradients(dtypes: list[torch.dtype], sizes: tuple[int, ...]) -> list[Tensor]:
    """Aligned and not."""
    return [
        randn(size + 1, dtype=dtype)[shift : shift + size] for dtype in dtypes for size in sizes for shift in (0, 1)
    ]


def takes_gradients_in_one_launch(put: Put, what: str, dtypes: list[torch.dtype]) -> None:
    """Of all sizes, long enough for several chunks."""
    sizes = (1, 7, 40_000, 16_384, 0)
    into, sources = gradients(dtypes, sizes), gradients(dtypes, sizes)
    rooms = [put(torch.full((len(one) + 16 + at % 2,), GUARD, dtype=one.dtype)) for at, one in enumerate(into)]
    on_device = [room[8 + at % 2 : -8].copy_(into[at]) for at, room in enumerate(rooms)]
    others = [put(torch.cat([one[:1], one]))[1:] if at % 4 == 1 else put(one) for at, one in enumerate(sources)]
    numbers = {"copy": (), "accumulate": (0.3,), "average": (0.9,)}[what]
    run: Any = {"copy": grads_copy, "accumulate": grads_accumulate, "average": grads_average}[what]
    run(into, sources, *numbers)
    run(on_device, others, *numbers)
    for at, (room, got, want) in enumerate(zip(rooms, on_device, into, strict=True)):
        error = float((got.cpu().double() - want.double()).norm())
        assert same_bits(got.cpu(), want) if what == "copy" else error <= TOLERANCE[got.dtype] * 200
        assert bool((room[: 8 + at % 2] == GUARD).all() and (room[-8:] == GUARD).all())
