"""The native launchers against the eager ops: every rule, dtype and form, and what they must refuse."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastadv import native
from fastadv.arguments.rule import BALLS, DIRECTIONS
from fastadv.native.rows import rows_back_up, rows_restore, rows_touched
from fastadv.native.rows import rows_step as native_rows_step
from fastadv.ops.rows import eager_back_up, eager_restore, eager_touched
from fastadv.ops.rows import eager_step as eager_rows_step
from tests.flat import row_steps
from tests.support import same_bits

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")

rows_step, eager_step = row_steps(native_rows_step), row_steps(eager_rows_step)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [F32, F64, BF16, F16]
EPSILON = {F32: 4e-7, F64: 1e-15, BF16: 2**-8, F16: 2**-10}  # a few roundings; one of storage for 16 bits
SHAPES = [(5, 3), (1, 1), (9, 33), (40, 129), (3, 1000), (1, 768), (0, 3), (4, 0)]
RULES = list(itertools.product(DIRECTIONS, BALLS))


def guarded(values: Tensor, gap: int = 0) -> tuple[Tensor, Tensor]:
    """A copy of a table inside a larger buffer of NaN, with `gap` more between its rows; and that buffer."""
    rows, dim = values.shape
    room = torch.full((rows + 16, dim + 16 + gap), math.nan, dtype=values.dtype)
    inner = room[8 : rows + 8, 8 : 8 + dim] if gap else room.view(-1)[64 : 64 + values.numel()].view(values.shape)
    inner.copy_(values)
    return inner, room


def outside(room: Tensor, inner: Tensor) -> int:
    """How many numbers of the buffer are still NaN, beside those of the table."""
    return int(room.isnan().sum()) - int(inner.isnan().sum())


def chosen(form: str, rows: int) -> Tensor | None:
    lists = {"all": None, "none": [], "some": list(range(0, rows, 2)), "every": list(range(rows))}
    return None if lists[form] is None else torch.tensor(lists[form], dtype=torch.int64)


def skips() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def sparse(rows: int, dim: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    """A gradient of which some rows are zero."""
    grad = size * torch.randn(rows, dim, dtype=F64) * (torch.rand(rows, 1) < 0.7)
    return grad.to(dtype)


def agree(
    table: Tensor, grad: Tensor, rows: Tensor | None, gap: int = 0, steps: int = 3, **rule: Any
) -> tuple[Tensor, Tensor]:
    """Runs both versions on copies and compares them; returns what the native one gave, and its skips."""
    arguments: dict[str, Any] = {"step_size": 0.3, "epsilon": 0.5, "direction": "l2", "ball": "l2", "group": 0} | rule
    got, room = guarded(table, gap)
    given, grad_room = guarded(grad, gap)
    want, skipped, want_skipped = table.clone(), skips(), skips()
    saved, spare = rows_back_up(got, rows), outside(room, got)
    for _ in range(steps):
        version = got._version
        rows_step(got, given, saved, rows, skipped, **arguments)
        eager_step(want, grad, saved, rows, want_skipped, **arguments)
        assert got._version == version + 1
        assert int(skipped) == int(want_skipped)
        bound = EPSILON[table.dtype] * (table.abs().double() + 1)
        assert ((got.double() - want.double()).abs() <= bound).all(), (arguments, (got - want).abs().max())
        want.copy_(got)  # roundings of one step are not to grow in the next
    assert outside(room, got) == spare
    assert same_bits(given, grad) and outside(grad_room, given) == spare
    return got, skipped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_step_agrees_with_eager(shape: tuple[int, int], direction: str, ball: str, dtype: torch.dtype) -> None:
    for form, group, gap in itertools.product(("all", "none", "some", "every"), (0, 1), (0, 5)):
        table, rows = torch.randn(shape).to(dtype), chosen(form, shape[0])
        got, _ = agree(table, sparse(*shape, dtype), rows, gap, direction=direction, ball=ball, group=group)
        still = torch.ones(shape[0], dtype=torch.bool)
        still[slice(None) if rows is None else rows] = False
        assert same_bits(got[still], table[still])


@pytest.mark.parametrize(("direction", "ball"), RULES)
@pytest.mark.parametrize(("dtype", "size"), [(F32, 1e30), (F32, 1e-30), (F32, 1e-42), (F64, 1e200), (F64, 1e-300)])
def test_tiny_and_huge_gradients(direction: str, ball: str, dtype: torch.dtype, size: float) -> None:
    for group in (0, 1):
        grad = sparse(6, 70, dtype, size)
        agree(torch.randn(6, 70, dtype=dtype), grad, None, direction=direction, ball=ball, group=group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_zero_and_non_finite_gradients_change_nothing(direction: str, ball: str, dtype: torch.dtype) -> None:
    table = 5 * torch.randn(4, 20).to(dtype)
    table[2, 3] = -0.0
    saved = table + 1  # outside of any ball: a projection by itself would move it
    for bad, count in ((0.0, 0), (math.nan, 1), (math.inf, 1), (-math.inf, 1)):
        for group, rows in itertools.product((0, 1), (None, torch.tensor([0, 2, 3]))):
            grad = torch.randn(4, 20).to(dtype) if group else torch.zeros(4, 20, dtype=dtype)
            grad[2] = 0
            grad[2, 19] = bad
            got, skipped = table.clone(), skips()
            some = saved if rows is None else saved[rows]
            rows_step(got, grad, some, rows, skipped, 0.3, 0.5, direction, ball, group)
            assert int(skipped) == count
            still = got[2:3] if group else got
            assert same_bits(still, table[2:3] if group else table)


def test_the_step_that_undoes_the_last() -> None:
    """The norm after the step is a difference of nearly equal numbers."""
    for dtype, left in itertools.product((F32, F64), (0.0, 1e-7, 1e-3, 0.1)):
        start, grad = torch.randn(7, 100, dtype=dtype), torch.randn(7, 100, dtype=dtype)
        table = start - 0.3 * grad / grad.norm() * (1 - left)
        for ball, epsilon in itertools.product(("l2", "unit"), (0.3, 1e-2)):
            got, want = table.clone(), table.clone()
            rows_step(got, grad, start, None, skips(), 0.3, epsilon, "l2", ball, 0)
            eager_step(want, grad, start, None, skips(), 0.3, epsilon, "l2", ball, 0)
            if left < 1e-3 and ball == "unit":  # what is left is rounding, and `unit` divides by it
                assert (got - start).norm() <= 1.1 * epsilon
            else:
                stretch = max(1, epsilon / (0.3 * left)) if ball == "unit" else 1
                assert (got - want).abs().max() <= 50 * torch.finfo(dtype).eps * stretch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    table, grad = torch.randn(700, 300).to(dtype), sparse(700, 300, dtype)
    before, rows = torch.get_num_threads(), eager_touched(grad)
    try:
        runs: list[list[Tensor]] = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            run = [rows_touched(grad), rows_back_up(table, rows), rows_back_up(table, None)]
            for (direction, ball), group, some in itertools.product(RULES, (0, 1), (None, rows)):
                moved, skipped = table.clone(), skips()
                saved = rows_back_up(table, some)
                for _ in range(2):
                    rows_step(moved, grad, saved, some, skipped, 0.3, 0.5, direction, ball, group)
                run += [moved.clone(), skipped]
                rows_restore(moved, saved, some)
                run.append(moved)
            runs.append(run)
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(same_bits(one, other) for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_touched(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for gap in (0, 3):
        grad, _ = guarded(sparse(*shape, dtype), gap)
        assert torch.equal(rows_touched(grad), eager_touched(grad))
    wide = torch.zeros(600, 3, dtype=dtype)
    assert rows_touched(wide).numel() == 0
    wide[1], wide[2, 2], wide[599, 0] = -0.0, math.nan, torch.finfo(dtype).smallest_normal
    wide[300, 1] = torch.tensor(1, dtype=torch.int16).view(torch.float16) if dtype == F16 else -math.inf
    assert rows_touched(wide).tolist() == [2, 300, 599]
    assert rows_touched(wide.T.contiguous().T).tolist() == [2, 300, 599]
    assert rows_touched(torch.ones((), dtype=dtype).expand(3, 4)).tolist() == [0, 1, 2]
    with torch.device("meta"):  # the default is no business of ours
        assert rows_touched(wide).tolist() == [2, 300, 599]


def bits(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bit patterns: zeros of both signs, denormals, infinities and NaN with payloads among them."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    patterns = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8).view(dtype).clone()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45]).to(dtype)
    places = torch.randint(0, max(patterns.numel(), 1), (6,), generator=generator)
    if patterns.numel():
        patterns[places] = special
    return patterns.view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies_keep_bits_and_leave_the_rest(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for form, gap in itertools.product(("all", "none", "some", "every"), (0, 5)):
        table, rows = bits(dtype, shape), chosen(form, shape[0])
        inner, room = guarded(table, gap)
        spare = outside(room, inner)
        saved = rows_back_up(inner, rows)
        assert same_bits(saved, eager_back_up(table, rows))
        assert saved.is_contiguous()
        inner.fill_(7)
        version = inner._version
        rows_restore(inner, saved, rows)
        want = torch.full_like(table, 7)
        eager_restore(want, saved, rows)
        assert same_bits(inner, want)
        assert inner._version == version + 1
        assert outside(room, inner) == spare


def restores(rows: int, dim: int, dtype: torch.dtype, picks: list[bool], seed: int, direction: str, ball: str) -> None:
    table, grad = bits(dtype, (rows, dim), seed), bits(dtype, (rows, dim), seed + 1)
    some = torch.tensor([n for n in range(rows) if picks[n]], dtype=torch.int64)
    for which in (some, None):
        moved = table.clone()
        saved = rows_back_up(moved, which)
        rows_step(moved, grad, saved, which, skips(), 0.3, 0.5, direction, ball, seed % 2)
        rows_restore(moved, saved, which)
        assert same_bits(moved, table)


CASES = {
    "rows": st.integers(0, 9),
    "dim": st.integers(0, 40),
    "dtype": st.sampled_from(DTYPES),
    "picks": st.lists(st.booleans(), min_size=9, max_size=9),
    "seed": st.integers(0, 10**6),
    "direction": st.sampled_from(DIRECTIONS),
    "ball": st.sampled_from(BALLS),
}


@settings(max_examples=200)
@given(**CASES)
def test_restore_undoes_whatever_happened(**case: Any) -> None:
    restores(**case)


@pytest.mark.slow
@settings(max_examples=10_000)
@given(**CASES)
def test_restore_undoes_whatever_happened_often(**case: Any) -> None:
    restores(**case)


W, G, N = torch.zeros(5, 3), torch.ones(5, 3), skips()
R, S = torch.tensor([1, 4]), torch.zeros(2, 3)
L2 = (0.3, 0.5, "l2", "l2", 0)
REFUSED: dict[str, tuple[Any, tuple[Any, ...], type[Exception], str]] = {
    "touched: vector": (rows_touched, (torch.zeros(3),), ValueError, r"shape \[V, D\]"),
    "touched: dtype": (rows_touched, (W.int(),), TypeError, "float32, float64, bfloat16, float16"),
    "touched: sparse": (rows_touched, (W.to_sparse(),), TypeError, "no plain memory"),
    "touched: device": (rows_touched, (W.to("meta"),), RuntimeError, "CPU alone.* on meta"),
    "back_up: rows dtype": (rows_back_up, (W, R.int()), TypeError, "int64"),
    "back_up: rows shape": (rows_back_up, (W, R.view(1, 2)), ValueError, r"rows must have shape \[K\]"),
    "back_up: below": (rows_back_up, (W, torch.tensor([-1])), IndexError, "row -1 at position 0 .* 5 rows"),
    "back_up: above": (rows_back_up, (W, torch.tensor([2, 5])), IndexError, "row 5 at position 1 .* 5 rows"),
    "back_up: twice": (rows_back_up, (W, torch.tensor([2, 2])), ValueError, "row 2 at position 1 .* only once"),
    "back_up: order": (rows_back_up, (W, torch.tensor([3, 1])), ValueError, "ascending"),
    "restore: strides": (rows_restore, (torch.zeros(3, 5).T, W, None), ValueError, "in place"),
    "restore: expanded": (rows_restore, (torch.zeros(3).expand(5, 3), W, None), ValueError, "overlap"),
    "restore: saved shape": (rows_restore, (W, W, R), ValueError, r"shape \(2, 3\)"),
    "restore: saved dtype": (rows_restore, (W, S.double(), R), TypeError, "must be torch.float32"),
    "restore: saved strides": (rows_restore, (W, torch.zeros(3, 2).T, R), ValueError, "contiguous"),
    "restore: saved device": (rows_restore, (W, S.to("meta"), R), ValueError, "saved is on meta"),
    "restore: above": (rows_restore, (W, S, torch.tensor([0, 2**40])), IndexError, "out of range"),
    "step: grad shape": (rows_step, (W, S, W.clone(), None, N, *L2), ValueError, r"grad must have shape \(5, 3\)"),
    "step: grad dtype": (rows_step, (W, G.double(), W.clone(), None, N, *L2), TypeError, "must be torch.float32"),
    "step: no saved": (rows_step, (W, G, None, None, N, *L2), ValueError, "saved cannot be None"),
    "step: saved": (rows_step, (W, G, S, None, N, *L2), ValueError, r"shape \(5, 3\)"),
    "step: direction": (rows_step, (W, G, S, R, N, 0.3, 0.5, "l1", "l2", 0), ValueError, "l2, sign, max"),
    "step: ball": (rows_step, (W, G, S, R, N, 0.3, 0.5, "l2", "l1", 0), ValueError, "l2, linf, unit, none"),
    "step: group": (rows_step, (W, G, S, R, N, 0.3, 0.5, "l2", "l2", 2), ValueError, "not 2"),
    "step: skipped dtype": (rows_step, (W, G, S, R, N.int(), *L2), TypeError, "int64"),
    "step: skipped shape": (rows_step, (W, G, S, R, R, *L2), ValueError, "0-d"),
    "step: rows device": (rows_step, (W, G, S, R.to("meta"), N, *L2), ValueError, "rows is on meta"),
    "step: order": (rows_step, (W, G, S, torch.tensor([4, 1]), N, *L2), ValueError, "rows_step: row 1 at position 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str) -> None:
    launcher, arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        launcher(*arguments)
    assert int(N) == 0
    assert not W.any()


def test_addresses_beyond_int32() -> None:
    """The last row of a table that begins 2^31 elements and more before it; its pages are never touched."""
    room = torch.empty(2**31 + 4096, dtype=BF16)
    table = room.as_strided((3, 8), (2**30, 1), 8)
    table[2] = 1
    table[0] = table[1] = 0
    assert rows_touched(table).tolist() == [2]
    rows_step(table, table.clone(), None, torch.tensor([2]), skips(), 8**0.5, None, "l2", "none", 0)
    assert (table[2] == 2).all()
