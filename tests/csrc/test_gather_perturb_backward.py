"""The native backward against the eager version and autograd, and its refusals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from fastadv import native
from fastadv.native.gather_perturb import gather_perturb_backward
from fastadv.ops.gather_perturb import eager_backward
from fastadv.ops.segment_sum import eager_segments

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def plan(ids: Tensor, vocabulary: int, kept: float = 0.7) -> tuple[Tensor, Tensor]:
    _, order, starts, _ = eager_segments(ids, torch.rand(len(ids)) < kept, vocabulary)
    return order, starts


def check(table: Tensor, grads: list[Tensor], ids: Tensor, padding: int) -> None:
    """Native and eager agree with the formula in float64; other rows keep their bits."""
    order, starts = plan(ids, len(table))
    want = table.double()
    for grad in grads:
        want = want.index_add(0, ids.long(), grad.double())
    if padding >= 0:
        want[padding] = table[padding].double()
    touched = torch.zeros(len(table), dtype=torch.bool).index_fill_(0, ids.long(), 1)
    if padding >= 0:
        touched[padding] = False
    for run in (gather_perturb_backward, eager_backward):
        got = table.clone(memory_format=torch.preserve_format)
        run(got, grads, ids, order, starts, padding)
        assert torch.equal(got[~touched], table[~touched])
        tolerance = TOLERANCE[table.dtype]
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding", [-1, 2])
@pytest.mark.parametrize(
    ("count", "vocabulary", "dim"),
    [(0, 5, 4), (1, 3, 1), (40, 11, 33), (40, 3, 129), (64, 250_002, 1), (9, 9, 0), (30, 7, 1030)],
    ids=str,
)
def test_agrees_with_the_formula(count: int, vocabulary: int, dim: int, padding: int, dtype: torch.dtype) -> None:
    table, ids = torch.randn(vocabulary, dim).to(dtype), torch.randint(vocabulary, (count,))
    grads = [torch.randn(count, dim).to(kind) for kind in (dtype, wide(dtype), dtype)]
    check(table, grads, ids, padding)
    check(table, grads[:1], ids.int(), padding)
    check(table, [], ids, padding)


@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("run", [gather_perturb_backward, eager_backward], ids=["native", "eager"])
def test_is_the_gradient_that_autograd_gives_the_table(run: Callable[..., None], padding: int | None) -> None:
    table = torch.randn(20, 7, dtype=torch.float64, requires_grad=True)
    ids, grads = torch.randint(20, (60,)), [torch.randn(60, 7, dtype=torch.float64) for _ in range(3)]
    total = torch.zeros(20, 7, dtype=torch.float64)
    for grad in grads:
        total += torch.autograd.grad(torch.nn.functional.embedding(ids, table, padding_idx=padding), table, grad)[0]
    got = torch.zeros(20, 7, dtype=torch.float64)
    run(got, grads, ids, *plan(ids, 20), -1 if padding is None else padding)
    torch.testing.assert_close(got, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("run", [gather_perturb_backward, eager_backward], ids=["native", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_is_summed_in_float32_and_rounded_once(run: Callable[..., None], dtype: torch.dtype) -> None:
    table, ids = torch.full((2, 1), 2048.0, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    run(table, [torch.ones(4, 1, dtype=dtype)] * 8, ids, *plan(ids, 2), -1)
    assert table.flatten().tolist() == [2080, 2048]  # 2048 + 1 is 2048 in both


def test_rows_may_be_strided_or_expanded_and_nothing_between_them_is_touched() -> None:
    storage = torch.full((9, 20), 7.0)
    table, ids = storage[2:7, 3:13], torch.tensor([4, 0, 4, 2])
    table.zero_()
    apart = torch.full((4, 16), math.nan)
    apart[:, 2:12] = 1
    order, starts = plan(ids, 5)
    gather_perturb_backward(table, [apart[:, 2:12], torch.ones(1, 10).expand(4, 10)], ids, order, starts, -1)
    assert table[:, 0].tolist() == [2, 0, 2, 0, 4]
    assert (table == table[:, :1]).all()
    outside = torch.ones_like(storage, dtype=torch.bool)
    outside[2:7, 3:13] = False
    assert (storage[outside] == 7).all()


def test_untouched_rows_and_padding_keep_a_nan() -> None:
    for run in (gather_perturb_backward, eager_backward):
        table = torch.full((5, 3), math.nan, dtype=torch.bfloat16)
        table[1] = 0
        bits = table.view(torch.int16).clone()
        ids = torch.tensor([1, 4, 1])
        run(table, [torch.ones(3, 3, dtype=torch.bfloat16)], ids, *plan(ids, 5), 4)
        assert table[1].tolist() == [2, 2, 2]
        rest = torch.tensor([0, 2, 3, 4])
        assert torch.equal(table.view(torch.int16)[rest], bits[rest])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    ids = torch.cat([torch.zeros(700, dtype=torch.int64), torch.randint(400, (900,))])
    order, starts = plan(ids, 400)
    table, outputs = torch.randn(400, 300).to(dtype), []
    grads = [torch.randn(1600, 300).to(dtype), torch.randn(1600, 300, dtype=wide(dtype))]
    for count in (1, 2, 3):
        threads(count)
        outputs.append(table.clone())
        gather_perturb_backward(outputs[-1], grads, ids, order, starts, -1)
    assert not torch.equal(outputs[0], table)
    assert torch.equal(outputs[1], outputs[0])
    assert torch.equal(outputs[2], outputs[0])


def test_raises_the_version_of_the_table_alone() -> None:
    table, grad, ids = torch.zeros(3, 2), torch.ones(2, 2), torch.tensor([2, 0])
    order, starts = plan(ids, 3)
    gather_perturb_backward(table, [grad], ids, order, starts, -1)
    assert table._version == 1
    assert [t._version for t in (grad, ids)] == [0, 0]


def test_autograd_notices_the_write() -> None:
    table, ids = torch.zeros(3, 2), torch.tensor([2, 0])
    factor = torch.ones(3, 2, requires_grad=True)
    product = table * factor
    gather_perturb_backward(table, [torch.ones(2, 2)], ids, *plan(ids, 3), -1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


T, G, IDS = torch.zeros(5, 3), torch.zeros(2, 3), torch.tensor([0, 1])
ORDER, STARTS = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
REFUSED = {
    "table dtype": ((T.int(), [G], IDS, ORDER, STARTS, -1), TypeError, "float32, float64, bfloat16, float16"),
    "table shape": ((T[0], [G], IDS, ORDER, STARTS, -1), ValueError, r"\[V, D\]"),
    "table strides": ((torch.zeros(3, 5).T, [G], IDS, ORDER, STARTS, -1), ValueError, "inner stride 1"),
    "table expanded": ((T[:1].expand(5, 3), [G], IDS, ORDER, STARTS, -1), ValueError, "overlap"),
    "table sparse": ((T.to_sparse(), [G], IDS, ORDER, STARTS, -1), TypeError, "no plain memory"),
    "grad dtype": (
        (T, [G.double()], IDS, ORDER, STARTS, -1),
        TypeError,
        "must be torch.float32, but is torch.float64",
    ),
    "grad half": ((T.bfloat16(), [G.half()], IDS, ORDER, STARTS, -1), TypeError, "torch.bfloat16"),
    "grad shape": ((T, [G[:1]], IDS, ORDER, STARTS, -1), ValueError, r"grad must have shape \(2, 3\)"),
    "grad device": ((T, [G.to("meta")], IDS, ORDER, STARTS, -1), ValueError, "grad is on meta"),
    "too many grads": ((T, [G] * 65, IDS, ORDER, STARTS, -1), ValueError, "65 grads"),
    "ids dtype": ((T, [G], IDS.float(), ORDER, STARTS, -1), TypeError, "int64 or int32"),
    "ids shape": ((T, [G], IDS.view(1, 2), ORDER, STARTS, -1), ValueError, r"\[N\]"),
    "order dtype": ((T, [G], IDS, ORDER.int(), STARTS, -1), TypeError, "order must be int64"),
    "order shape": ((T, [G], IDS, STARTS, STARTS, -1), ValueError, r"order must have shape \(2,\)"),
    "starts dtype": ((T, [G], IDS, ORDER, STARTS.int(), -1), TypeError, "starts must be int64"),
    "starts empty": ((T, [G], IDS, ORDER, STARTS[:0], -1), ValueError, r"\[S\+1\]"),
    "id too large": ((T, [G], torch.tensor([0, 5]), ORDER, STARTS, -1), IndexError, "id 5 at position 1 .* 5 rows"),
    "id below zero": ((T, [G], torch.tensor([-1, 2]), ORDER, STARTS, -1), IndexError, "id -1 at position 0"),
    "order outside": ((T, [G], IDS, torch.tensor([0, 2]), STARTS, -1), IndexError, r"order\[1\] is 2"),
    "order below zero": ((T, [G], IDS, torch.tensor([-1, 1]), STARTS, -1), IndexError, r"order\[0\] is -1"),
    "starts outside": ((T, [G], IDS, ORDER, torch.tensor([0, 1, 3]), -1), IndexError, "segment 1 "),
    "starts fall": ((T, [G], IDS, ORDER, torch.tensor([1, 0, 2]), -1), IndexError, "segment 0 "),
    "one id twice": ((T, [G], torch.tensor([3, 3]), ORDER, STARTS, -1), ValueError, "must rise"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str) -> None:
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        gather_perturb_backward(*arguments)  # type: ignore[arg-type]
    table = arguments[0]
    assert table._version == 0  # type: ignore[attr-defined]
    assert not T.any()


def test_a_grad_whose_elements_are_apart() -> None:
    grad = torch.randn(3, 2).T
    got, want = torch.zeros(5, 3), torch.zeros(5, 3)
    gather_perturb_backward(got, [grad], IDS, ORDER, STARTS, -1)
    gather_perturb_backward(want, [grad.contiguous()], IDS, ORDER, STARTS, -1)
    assert torch.equal(got, want)


@st.composite
def drawn(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], Tensor, int]:
    dtype = draw(st.sampled_from(DTYPES))
    vocabulary, dim = draw(st.integers(1, 50)), draw(st.integers(0, 20))
    words = draw(st.lists(st.integers(0, vocabulary - 1), max_size=20))
    kinds = draw(st.lists(st.sampled_from([dtype, wide(dtype)]), max_size=3))
    table, ids = torch.randn(vocabulary, dim).to(dtype), torch.tensor(words, dtype=torch.int64)
    return table, [torch.randn(len(words), dim).to(kind) for kind in kinds], ids, draw(st.integers(-1, vocabulary - 1))


@settings(max_examples=200)
@given(drawn())
def test_any_batch(case: tuple[Tensor, list[Tensor], Tensor, int]) -> None:
    check(*case)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(drawn())
def test_any_batch_many(case: tuple[Tensor, list[Tensor], Tensor, int]) -> None:
    check(*case)
