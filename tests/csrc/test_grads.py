"""The native launchers, and the plan around them, against plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastadv import native
from fastadv.native.grads import grads_accumulate, grads_average, grads_copy
from fastadv.ops.grads import Plan, eager_accumulate, eager_average, eager_copy
from tests.support import same_bits

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CALLS: dict[str, Any] = {
    "copy": (grads_copy, eager_copy, ()),
    "accumulate": (grads_accumulate, eager_accumulate, (0.3,)),
    "add": (grads_accumulate, eager_accumulate, (1.0,)),
    "average": (grads_average, eager_average, (0.99,)),
    "keep": (grads_average, eager_average, (1.0,)),
}
SIZES = [(3, 5), (), (0,), (1,), (1000, 7), (2, 0, 3), (33,), (129, 65), (1,)]


def lists(sizes: list[tuple[int, ...]], dtypes: list[torch.dtype], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    return [tensor.to(dtypes[i % len(dtypes)]) for i, tensor in enumerate(made)]


def guarded(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Copies, each inside a larger buffer of NaN, and those buffers."""
    rooms = [torch.full((t.numel() + 64,), math.nan, dtype=t.dtype) for t in tensors]
    inner = [room[32 : 32 + t.numel()].view(t.shape) for room, t in zip(rooms, tensors, strict=True)]
    for one, t in zip(inner, tensors, strict=True):
        one.copy_(t)
    return inner, rooms


def agree(got: list[Tensor], want: list[Tensor], name: str) -> None:
    for one, other in zip(got, want, strict=True):
        if name in {"copy", "keep"}:
            assert same_bits(one, other)
            continue
        bound = 3 * torch.finfo(one.dtype).eps * (other.double().abs() + 1)  # PyTorch may fuse multiply and add
        assert ((one.double() - other.double()).abs() <= bound).all()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtypes", [*([dtype] for dtype in DTYPES), DTYPES], ids=str)
def test_agrees_with_pytorch(dtypes: list[torch.dtype], name: str) -> None:
    launcher, eager, numbers = CALLS[name]
    start, sources = lists(SIZES, dtypes), lists(SIZES, dtypes, seed=1)
    got, rooms = guarded(start)
    versions = [tensor._version for tensor in got]
    launcher(got, sources, *numbers)
    want = [tensor.clone() for tensor in start]
    eager(want, sources, *numbers)
    agree(got, want, name)
    assert all(int(room.isnan().sum()) == 64 for room in rooms)
    assert all(tensor._version == version + 1 for tensor, version in zip(got, versions, strict=True))
    assert all(same_bits(a, b) for a, b in zip(sources, lists(SIZES, dtypes, seed=1), strict=True))


@pytest.mark.parametrize("name", CALLS)
def test_threads_change_nothing(name: str) -> None:
    launcher, _, numbers = CALLS[name]
    sizes = [(70_001,), (3,), (1,), (300, 300), (0,), (17,), (65_536,), (5, 5)]
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            into = lists(sizes, DTYPES)
            launcher(into, lists(sizes, DTYPES, seed=1), *numbers)
            runs.append(into)
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(same_bits(one, other) for one, other in zip(run, runs[0], strict=True))


def copies(sizes: list[int], dtypes: list[torch.dtype], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = [torch.randint(0, 256, (8 * size,), generator=generator, dtype=torch.uint8) for size in sizes]
    sources = [part.view(dtypes[i % len(dtypes)])[: sizes[i]] for i, part in enumerate(bits)]
    into, rooms = guarded([torch.zeros_like(source) for source in sources])
    grads_copy(into, sources)
    assert all(same_bits(one, other) for one, other in zip(into, sources, strict=True))
    assert all(room[:32].isnan().all() and room[-32:].isnan().all() for room in rooms)


CASES = {
    "sizes": st.lists(st.integers(0, 70), max_size=12),
    "dtypes": st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=200)
@given(**CASES)
def test_copies_every_bit(**case: Any) -> None:
    copies(**case)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(**CASES)
def test_copies_every_bit_often(**case: Any) -> None:
    copies(**case)


A, B = torch.zeros(3), torch.ones(3)
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "lengths": (([A], [B, B]), ValueError, "taken in pairs"),
    "dtypes": (([A], [B.double()]), TypeError, "as into is"),
    "shapes": (([A], [torch.ones(4)]), ValueError, "one shape"),
    "dtype": (([A.int()], [B.int()]), TypeError, "float32, float64, bfloat16, float16"),
    "strides": (([A], [torch.ones(6)[::2]]), ValueError, r"sources\.contiguous\(\)"),
    "expanded": (([torch.zeros(1).expand(3)], [B]), ValueError, "contiguous"),
    "sparse": (([A], [B.to_sparse()]), TypeError, "no plain memory"),
    "device": (([A], [B.to("meta")]), ValueError, "on meta"),
    "meta": (([A.to("meta")], [B.to("meta")]), RuntimeError, "no native backend for meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str) -> None:
    (into, sources), error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        grads_copy([torch.zeros(2), *into], [torch.ones(2), *sources])
    assert not A.any()


def test_empty_lists() -> None:
    grads_copy([], [])
    Plan([], []).accumulate(1.0)


def test_a_plan_goes_through_cpp_and_says_when_it_cannot() -> None:
    plan = Plan([torch.zeros(3)], [torch.ones(3)], fused=True)
    plan.copy()
    with pytest.raises(RuntimeError, match="fused=True"):
        Plan([torch.zeros(3)], [torch.ones(6)[::2]], fused=True).copy()
