"""The native plan and sum against their eager versions, and their refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastadv import native
from fastadv.native.segment_sum import segment_sum, segments
from fastadv.ops.segment_sum import eager, eager_segments
from tests.csrc.guards import guards_stand, untouched, watched

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
Case = tuple[Tensor, Tensor | None, int]


def cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)

    def some(count: int, vocabulary: int, kept: float) -> Case:
        mask = torch.rand(count, generator=generator) < kept
        return torch.randint(vocabulary, (count,), generator=generator), mask, vocabulary

    return {
        "repeats": some(101, 17, 0.7),
        "large vocabulary": some(333, 250_002, 0.7),
        "three digits": some(65, 2**31, 0.5),
        "six digits": some(65, 2**62, 0.5),
        "more positions than words": some(50, 3, 0.5),
        "all masked": some(20, 7, 0.0),
        "none masked": some(20, 7, 2.0),
        "no mask": (torch.tensor([3, 1, 3, 0]), None, 5),
        "all equal": (torch.full((40,), 6), torch.arange(40) % 3 > 0, 7),
        "all distinct": (torch.arange(64).flip(0), torch.arange(64) % 3 > 0, 64),
        "one": (torch.tensor([0]), None, 1),
        "one masked": (torch.tensor([4]), torch.tensor([False]), 5),
        "none": (torch.zeros(0, dtype=torch.int64), None, 5),
        "none of none": (torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.bool), 0),
    }


CASES = cases()


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def check_plan(ids: Tensor, mask: Tensor | None, vocabulary: int) -> None:
    for got, want in zip(segments(ids, mask, vocabulary), eager_segments(ids, mask, vocabulary), strict=True):
        assert got.dtype == torch.int64
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_plan_agrees_with_pytorch(name: str) -> None:
    check_plan(*CASES[name])


def test_plan_takes_int32_and_strided_ids_and_masks() -> None:
    ids, mask = torch.randint(9, (40,), dtype=torch.int32), torch.rand(40) < 0.5
    check_plan(ids, mask, 9)
    check_plan(ids[::3], mask[::3], 9)
    check_plan(torch.tensor(5).expand(6), torch.tensor(True).expand(6), 9)


@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**63)])
def test_an_id_out_of_range_is_named(bad: int) -> None:
    with pytest.raises(IndexError, match=rf"segments: id {bad} at position 2 .* table of 5 rows"):
        segments(torch.tensor([0, 4, bad]), None, 5)
    with pytest.raises(IndexError, match=rf"segments: id {bad} .* table of 5 rows"):
        eager_segments(torch.tensor([0, 4, bad]), None, 5)


@pytest.mark.parametrize("name", CASES)
def test_plan_stays_inside_its_buffers_and_an_error_writes_nothing(name: str) -> None:
    ids, mask, vocabulary = CASES[name]
    if len(ids):
        wrong = watched(ids)
        wrong[-1] = vocabulary
        with pytest.raises(IndexError):
            segments(wrong, mask, vocabulary)
        assert len(wrong.rooms) == 4
        assert all(map(untouched, wrong.rooms))
    good = watched(ids)
    for got, want in zip(segments(good, mask, vocabulary), eager_segments(ids, mask, vocabulary), strict=True):
        assert torch.equal(got, want)
    assert all(map(guards_stand, good.rooms))


def check_sum(values: Tensor, case: Case) -> None:
    ids, mask, vocabulary = case
    _, order, starts, stops = eager_segments(ids, mask, vocabulary)
    got = segment_sum(values, order, starts, stops)
    want = eager(values, order, starts, stops)
    assert got.dtype == want.dtype == (torch.float64 if values.dtype == torch.float64 else torch.float32)
    assert got.shape == (min(len(ids), vocabulary), values.shape[1])
    assert got.is_contiguous()
    tolerance = 1e-12 if values.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    assert torch.equal(segment_sum(values, order, starts[: len(stops)].clone(), stops), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, 33, 129, 513, 1030])
@pytest.mark.parametrize("name", CASES)
def test_sum_agrees_with_pytorch(name: str, dim: int, dtype: torch.dtype) -> None:
    check_sum(torch.randn(len(CASES[name][0]), dim, dtype=torch.float64).to(dtype), CASES[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 33])
def test_rows_may_be_strided_or_expanded(dim: int, dtype: torch.dtype) -> None:
    case = CASES["repeats"]
    storage = torch.full((101, 64), math.nan, dtype=dtype)
    storage[:, 5 : 5 + dim] = torch.randn(101, dim).to(dtype)
    check_sum(storage[:, 5 : 5 + dim], case)
    check_sum(torch.randn(1, dim).to(dtype).expand(101, dim), case)


@pytest.mark.parametrize("run", [segment_sum, eager], ids=["native", "eager"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_masked_does_not_leak(name: str, run: Any, poison: float) -> None:
    ids, mask, vocabulary = CASES[name]
    mask = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask
    plan = segments(ids, mask, vocabulary)[1:]
    values = torch.randn(len(ids), 9)
    clean = run(values, *plan)
    values[~mask] = poison
    assert torch.equal(run(values, *plan), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    ids = torch.cat([torch.zeros(700, dtype=torch.int64), torch.randint(400, (900,))])  # one word is long
    plan = segments(ids, torch.rand(1600) < 0.8, 400)[1:]
    values, outputs = torch.randn(1600, 300, dtype=torch.float64).to(dtype), []
    for count in (1, 2, 3):
        threads(count)
        outputs.append(segment_sum(values, *plan))
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


def test_sums_are_written_inside_their_buffer_and_not_at_all_on_error() -> None:
    ids, mask, vocabulary = CASES["repeats"]
    _, order, starts, stops = segments(ids, mask, vocabulary)
    for bad in (-1, 102, 2**40):
        values, wrong = watched(torch.randn(101, 33)), order.clone()
        wrong[50] = bad
        with pytest.raises(IndexError, match=rf"order\[50\] is {bad}.* 101 positions"):
            segment_sum(values, wrong, starts, stops)
        wrong = stops.clone()
        wrong[3] = bad
        with pytest.raises(IndexError, match="segment 3 "):
            segment_sum(values, order, starts, wrong)
        assert len(values.rooms) == 2
        assert all(map(untouched, values.rooms))
    segment_sum(values, order, starts, stops)
    assert guards_stand(values.rooms[2])


IDS, MASK = torch.tensor([0, 1]), torch.tensor([True, False])
REFUSED_PLANS = {
    "ids dtype": ((IDS.float(), None, 3), TypeError, "int64 or int32"),
    "ids shape": ((IDS.view(1, 2), None, 3), ValueError, r"must have shape \[N\]"),
    "ids device": ((IDS.to("meta"), None, 3), RuntimeError, "CPU alone.* on meta"),
    "ids sparse": ((IDS.to_sparse(), None, 3), (TypeError, RuntimeError), "."),
    "mask dtype": ((IDS, MASK.int(), 3), TypeError, "mask must be bool"),
    "mask shape": ((IDS, MASK[:1], 3), ValueError, r"mask must have shape \(2,\)"),
    "mask device": ((IDS, MASK.to("meta"), 3), ValueError, "mask is on meta"),
    "vocabulary": ((IDS, None, -1), ValueError, "cannot be -1"),
}


@pytest.mark.parametrize("name", REFUSED_PLANS)
def test_plan_refuses(name: str) -> None:
    arguments, error, message = REFUSED_PLANS[name]
    with pytest.raises(error, match=message):
        segments(*arguments)  # type: ignore[arg-type]


V, I = torch.zeros(2, 3), torch.tensor([0, 1])
REFUSED_SUMS = {
    "values dtype": ((V.int(), I, I, I), TypeError, "float32, float64, bfloat16, float16"),
    "values shape": ((V[0], I, I, I), ValueError, r"must have shape \[N, D\]"),
    "values sparse": ((V.to_sparse(), I, I, I), TypeError, "no plain memory"),
    "order dtype": ((V, I.int(), I, I), TypeError, "order must be int64"),
    "order shape": ((V, I[:1], I, I), ValueError, r"order must have shape \(2,\)"),
    "order strides": ((V, torch.arange(4)[::2], I, I), ValueError, r"order\.contiguous\(\)"),
    "order device": ((V, I.to("meta"), I, I), ValueError, "order is on meta"),
    "starts dtype": ((V, I, I.int(), I), TypeError, "starts must be int64"),
    "starts too short": ((V, I, I[:1], I), ValueError, "at least one for each of stops"),
    "stops dtype": ((V, I, I, I.float()), TypeError, "stops must be int64"),
    "stops shape": ((V, I, I, I.view(1, 2)), ValueError, r"stops must have shape \[R\]"),
}


@pytest.mark.parametrize("name", REFUSED_SUMS)
def test_sum_refuses(name: str) -> None:
    arguments, error, message = REFUSED_SUMS[name]
    with pytest.raises(error, match=message):
        segment_sum(*arguments)


@pytest.mark.parametrize("values", [torch.randn(3, 2).T, torch.randn(2, 1).expand(2, 3)], ids=["columns", "expanded"])
def test_values_whose_elements_are_apart(values: Tensor) -> None:
    plan = (torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([1, 2]))
    assert torch.equal(segment_sum(values, *plan), segment_sum(values.contiguous(), *plan))


def test_nothing_is_mutated() -> None:
    ids, mask, vocabulary = CASES["repeats"]
    values, plan = torch.randn(101, 3), segments(ids, mask, vocabulary)[1:]
    before = [t.clone() for t in (values, *plan)]
    segment_sum(values, *plan)
    for now, then in zip((values, *plan), before, strict=True):
        assert torch.equal(now, then)
        assert now._version == 0


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    vocabulary = draw(st.sampled_from([1, 2, 7, 100, 2**11, 30_522, 250_002, 2**40]))
    words = draw(st.lists(st.integers(0, min(vocabulary - 1, draw(st.sampled_from([3, 2**40])))), max_size=25))
    kept = draw(st.none() | st.lists(st.booleans(), min_size=len(words), max_size=len(words)))
    mask = None if kept is None else torch.tensor(kept, dtype=torch.bool)
    return torch.tensor(words, dtype=torch.int64), mask, vocabulary


def check_drawn(case: Case, dim: int, dtype: torch.dtype) -> None:
    check_plan(*case)
    check_sum(torch.randn(len(case[0]), dim).to(dtype), case)


@settings(max_examples=200)
@given(drawn(), st.integers(0, 40), st.sampled_from(DTYPES))
def test_any_plan(case: Case, dim: int, dtype: torch.dtype) -> None:
    check_drawn(case, dim, dtype)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(drawn(), st.integers(0, 40), st.sampled_from(DTYPES))
def test_any_plan_many(case: Case, dim: int, dtype: torch.dtype) -> None:
    check_drawn(case, dim, dtype)
