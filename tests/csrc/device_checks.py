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
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 4e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}  # of how far all moves
DIMS = [1, 33, 768, 1025]
RULES = list(itertools.product(DIRECTIONS, BALLS, (0, 1)))  # direction, ball, group
LAYOUTS = ["aligned", "shifted", "uneven"]  # to 16 bytes every row, none, and the first alone
GUARD = 77.0
COUNT = 37  # rows


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def chosen(some: bool, count: int) -> Tensor | None:
    return torch.tensor([0, 3, 4, count - 1]) if some else None


def there(put: Put, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else put(tensor)


def guarded(put: Put, table: Tensor, layout: str = "shifted") -> tuple[Tensor, Tensor]:
    """A copy on the device whose rows lie apart between guards, and all of that memory."""
    rows, dim = table.shape
    left = 1 if layout == "shifted" else 8
    width = -(-dim // 8) * 8 + 16 + (layout != "aligned")
    room = put(torch.full((rows + 4, width), GUARD, dtype=table.dtype))
    room[2:-2, left : left + dim] = put(table)
    return room[2:-2, left : left + dim], room


def untouched(room: Tensor, inner: Tensor) -> bool:
    left, dim = inner.storage_offset() - room[2:].storage_offset(), inner.shape[1]
    edges = (room[:2], room[-2:], room[:, :left], room[:, left + dim :])
    return all(bool((edge == GUARD).all()) for edge in edges)


def keeps_and_puts_back(put: Put, dtype: torch.dtype, dim: int, some: bool, layout: str) -> None:
    """Bit for bit."""
    table, rows = randn(COUNT, dim, dtype=dtype), chosen(some, COUNT)
    table[3] = math.nan
    on_device, room = guarded(put, table, layout)
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


def radii(rule: tuple[str, str, int], elements: int) -> tuple[float, float]:
    """A step and a ball of which every element of a group notices something."""
    direction, ball, _ = rule
    of_l2 = ball == "l2" or (ball == "unit" and direction == "l2")
    return 0.3 * (elements**0.5 if direction == "l2" else 1), 0.2 * (elements**0.5 if of_l2 else 1)


def steps_twice(
    put: Put, dtype: torch.dtype, dim: int, rule: tuple[str, str, int], some: bool, layout: str, count: int = COUNT
) -> None:
    """Like the CPU's, the same bits each time however the rows lie, and nothing beside the table."""
    group, rows = rule[-1], chosen(some, count)
    table, grad, skipped = randn(count, dim, dtype=dtype), randn(count, dim, dtype=dtype), torch.tensor(0)
    start, numbers = table.double().clone(), (*radii(rule, dim * (1 if group else 4 if some else count)), *rule)
    if group:
        grad[3, 0] = math.nan
    saved = rows_back_up(table, rows)
    on_device, room = guarded(put, table, layout)
    slope, slope_room = guarded(put, grad, layout)
    given: list[Any] = [put(saved), there(put, rows), put(skipped)]
    again, close_by = put(table), put(grad)
    for _ in range(2):
        rows_step(table, grad, saved, rows, skipped, *numbers)
        rows_step(on_device, slope, *given, *numbers)
    assert int(given[2]) == int(skipped) == 2 * group
    error = (on_device.cpu().double() - table.double()).norm() / (table.double() - start).norm()
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


def does_nothing_to_nothing(put: Put) -> None:
    """A grid without blocks would be an error."""
    for shape, rows in (((0, 3), None), ((4, 0), None), ((4, 3), put(torch.zeros(0, dtype=torch.int64)))):
        table = put(torch.zeros(shape))
        saved = rows_back_up(table, rows)
        rows_step(table, put(torch.ones(shape)), saved, rows, put(torch.tensor(0)), 1.0, 1.0, "l2", "l2", 0)
        rows_restore(table, saved, rows)
        assert not table.any()
    grads_copy([put(torch.zeros(0))], [put(torch.zeros(0))])


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
    sizes = (1, 7, 40_003, 16_384, 0)
    into, sources = gradients(dtypes, sizes), gradients(dtypes, sizes)
    rooms = [put(torch.full((len(one) + 16 + at % 2,), GUARD, dtype=one.dtype)) for at, one in enumerate(into)]
    on_device = [room[8 + at % 2 : -8].copy_(into[at]) for at, room in enumerate(rooms)]
    others = [put(torch.cat([one[:1], one]))[1:] if at % 4 == 1 else put(one) for at, one in enumerate(sources)]
    numbers = {"copy": (), "accumulate": (0.3,), "average": (0.9,)}[what]
    run: Any = {"copy": grads_copy, "accumulate": grads_accumulate, "average": grads_average}[what]
    run(into, sources, *numbers)
    run(on_device, others, *numbers)
    for at, (room, got, want) in enumerate(zip(rooms, on_device, into, strict=True)):
        bound = 0 if what == "copy" else 3 * torch.finfo(got.dtype).eps * (want.double().abs() + 1)
        assert ((got.cpu().double() - want.double()).abs() <= bound).all()
        assert bool((room[: 8 + at % 2] == GUARD).all() and (room[-8:] == GUARD).all())
