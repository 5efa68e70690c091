"""What `--backend triton` must reveal: faults planted in small kernels, each of which is right in order by luck."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastadv import kernels

if not kernels.interpreted():
    pytest.skip("not interpreted: --backend triton", allow_module_level=True)

import triton
import triton.language as tl

from tests.csrc.guards import guards_stand
from tests.kernels.interpreter import rooms

PROGRAMS, TILE = 16, 8


@triton.jit
def count_kernel(out, FIRST: tl.constexpr):
    """Program p counts on from program p - 1."""
    p = tl.program_id(0)
    before = tl.load(out + p - 1, mask=p > FIRST, other=0)
    tl.store(out + p, before + 1)


@triton.jit
def double_kernel(x, out, count, ROOM: tl.constexpr, TILE: tl.constexpr):
    """A tile for each program, of which those beyond `count`, in units of ROOM, are left out."""
    at = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tl.store(out + at, 2 * tl.load(x + at, mask=at < count, other=0), mask=at < count // ROOM * ROOM)


def doubled(x: Tensor, room: int, beyond: int = 0) -> Tensor:
    out = torch.empty_like(x)
    double_kernel[(PROGRAMS + beyond,)](x, out, len(x) + beyond, room, TILE)
    return out


def test_programs_that_need_each_other() -> None:
    out, orders = torch.zeros(PROGRAMS), set()
    for _ in range(3):
        count_kernel[(PROGRAMS,)](out.zero_(), 0)
        assert out.tolist() != list(range(1, PROGRAMS + 1))
        orders.add(tuple(out.tolist()))
    assert len(orders) == 3
    count_kernel[(PROGRAMS,)](out, PROGRAMS)
    assert out.tolist() == [1] * PROGRAMS  # none needs another: all of them have run


def test_output_that_nobody_writes() -> None:
    x = torch.arange(PROGRAMS * TILE - 3.0)
    assert torch.equal(doubled(x, 1), 2 * x)
    found = doubled(x, TILE)
    assert found.isnan().sum() == len(x) % TILE
    assert torch.equal(found.nan_to_num(math.inf), torch.where(found.isnan(), math.inf, 2 * x))


def test_output_beside_the_output() -> None:
    x = torch.arange(PROGRAMS * TILE + 1.0)[:-1]  # one program too many reads what comes next: a number, and no NaN
    doubled(x, 1)
    assert all(map(guards_stand, rooms))
    doubled(x, 1, beyond=1)
    assert not guards_stand(rooms.pop())
