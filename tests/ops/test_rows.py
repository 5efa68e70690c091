"""`rows`: what the ops promise, eager and native, against the formula and against `ascend`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastadv import reference
from fastadv.arguments.rule import BALLS, DIRECTIONS
from fastadv.ops import ascend, rows
from tests.support import same_bits

FUSED = [None, False]


def skips() -> Tensor:
    return torch.zeros((), dtype=torch.int64)


def words(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A table of 50 words, and a gradient of which 7 rows are touched."""
    table, grad = torch.randn(50, 16).to(dtype), torch.zeros(50, 16, dtype=dtype)
    grad[torch.randperm(50)[:7]] = torch.randn(7, 16).to(dtype)
    return table, grad


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_touched_rows_are_those_that_hold_something(dtype: torch.dtype, fused: bool | None) -> None:
    grad = torch.zeros(6, 3, dtype=dtype)
    grad[1, 0], grad[2, 2], grad[5, 1] = -0.0, math.nan, -1.0
    found = rows.touched(grad, fused=fused)
    assert found.dtype == torch.int64
    assert found.tolist() == [2, 5]
    assert rows.touched(torch.zeros(0, 3, dtype=dtype), fused=fused).tolist() == []


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_l2_step_is_the_classic_one(steps: int, fused: bool | None) -> None:
    """Touched rows alone, and every row: the numbers of the reference, which moves the whole table."""
    start, grad = words()
    embedding = torch.nn.Embedding(50, 16, _weight=start.clone())
    attacker = reference.PGD(embedding, embedding)
    for some in (rows.touched(grad, fused=fused), None):
        table, skipped = start.clone(), skips()
        saved = rows.back_up(table, some, fused=fused)
        embedding.weight.data = start.clone()
        for t in range(steps):
            embedding.weight.grad = grad * (t + 1) + (t == 2) * grad.roll(1, 1)
            rows.step(
                table, embedding.weight.grad, skipped=skipped, step_size=0.3, epsilon=0.5, saved=saved, rows=some,
                fused=fused,
            )  # fmt: skip
            attacker.attack(0.5, 0.3, is_first_attack=t == 0)
            assert (table - embedding.weight).abs().max() <= 4e-16 * start.abs().max()
        attacker.restore()
        rows.restore(table, saved, some, fused=fused)
        assert same_bits(table, start)
        assert int(skipped) == 0


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("ball", BALLS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_moves_as_ascend_does(direction: str, ball: str, group: int, fused: bool | None) -> None:
    start, grad = words()
    some = rows.touched(grad)
    delta, table, skipped = torch.zeros(7, 16).double(), start.clone(), skips()
    saved = rows.back_up(table, some)
    rule = {"step_size": 0.3, "epsilon": 0.4, "direction": direction, "ball": ball, "group": group, "fused": fused}
    for _ in range(3):
        rows.step(table, grad, skipped=skipped, saved=saved, rows=some, **rule)
        ascend(delta, grad[some], skipped=skipped, **rule)
        assert torch.allclose(table[some] - saved, delta, atol=1e-14)
    assert int(skipped) == 0


@pytest.mark.parametrize("fused", FUSED)
def test_no_gradient_and_no_number_change_nothing(fused: bool | None) -> None:
    start, grad = words()
    for bad, count in ((0.0, 0), (math.nan, 1), (math.inf, 1)):
        table, skipped = start.clone(), skips()
        given = torch.zeros_like(grad) if bad == 0 else grad.clone()
        given[3, 3] = bad
        rows.step(table, given, skipped=skipped, step_size=0.3, epsilon=0.1, saved=start + 1, fused=fused)
        assert same_bits(table, start)
        assert int(skipped) == count


@pytest.mark.parametrize("fused", FUSED)
def test_errors(fused: bool | None) -> None:
    table, grad = words()
    with pytest.raises(ValueError, match="saved cannot be None"):
        rows.step(table, grad, skipped=skips(), step_size=0.3, epsilon=0.1, fused=fused)
    with pytest.raises(ValueError, match="direction must be one of"):
        rows.step(table, grad, skipped=skips(), step_size=0.3, epsilon=0.1, direction="l1", fused=fused)
    with pytest.raises(ValueError, match=r"shape \(2, 16\), but has \(50, 16\)"):
        rows.restore(table, grad, torch.tensor([1, 2]), fused=fused)
    with pytest.raises(TypeError, match=r"grad must be torch\.float64"):
        rows.step(table, grad.float(), skipped=skips(), step_size=0.3, epsilon=None, fused=fused)
    with pytest.raises(IndexError):
        rows.back_up(table, torch.tensor([50]), fused=fused)


@pytest.mark.parametrize("with_rows", [False, True])
def test_opcheck(with_rows: bool) -> None:
    table, grad = words(torch.float32)
    some = rows.touched(grad) if with_rows else None
    saved = rows.back_up(table, some)
    ops = torch.ops.fastadv
    torch.library.opcheck(ops.rows_touched.default, (grad,))
    torch.library.opcheck(ops.rows_back_up.default, (table, some))
    torch.library.opcheck(ops.rows_restore.default, (table, saved, some))
    step = (table, grad, saved, some, skips(), 0.3, 0.5, "l2", "l2", 0)
    torch.library.opcheck(ops.rows_step.default, step)


def test_a_saved_table_that_moved_is_noticed() -> None:
    """Autograd keeps a tied output layer's weight: moving it between forward and backward must be an error."""
    weight = torch.randn(5, 3, requires_grad=True)
    loss = (torch.randn(2, 3, requires_grad=True) @ weight.T).sum()
    rows.step(weight.detach(), torch.ones(5, 3), skipped=skips(), step_size=1.0, epsilon=None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
