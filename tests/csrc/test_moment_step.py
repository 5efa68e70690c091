"""The C++ step by moments against the eager one: every form and dtype, groups of many blocks, any number of threads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.moments import Moments, planes
from fastadv.arguments.rule import MOMENT_BALLS, MOMENT_DIRECTIONS, Rule
from fastadv.native.moment_step import moment_step
from fastadv.ops.moment_step import eager
from tests.csrc.test_ascend import DTYPES, F16, F32, F64, edges, embed, guarded, hidden, values

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")

RULES = list(itertools.product(MOMENT_DIRECTIONS, MOMENT_BALLS))
TOLERANCE = {F32: 4e-6, F64: 1e-13}


class Case:
    """One call: runs both versions on copies and compares them."""

    def __init__(
        self, delta: Tensor, grad: Tensor, mask: Tensor | None = None, embedding: tuple[Any, ...] | None = None,
        starts: list[int] | None = None, **rule: Any,
    ) -> None:  # fmt: skip
        self.delta, self.grad, self.mask, self.embedding = delta, grad, mask, embedding
        self.rule = Rule(**{"step_size": 0.03, "epsilon": 0.5, "direction": "adam", "ball": "l2", "group": 0} | rule)
        self.moments = 0.1 * torch.rand(planes(self.rule.direction), *delta.shape, dtype=delta.dtype)
        self.starts = None if starts is None else torch.tensor(starts)

    def run(self, step: Any) -> tuple[Tensor, Tensor, int, Tensor | None]:
        delta, moments = guarded(self.delta), guarded(self.moments)
        skipped, lookup, words = torch.zeros((), dtype=torch.int64), None, None
        if self.embedding is not None:
            weight, ids, slot = self.embedding
            words = guarded(torch.full((*ids.shape, weight.shape[1]), math.nan, dtype=weight.dtype))
            lookup = Lookup(weight, ids, slot, words[0])
        by = Moments.of(self.rule, 3)
        step(delta[0], self.grad, self.mask, skipped, moments[0], self.rule, by, lookup, self.starts)
        for _, room in (delta, moments, *([] if words is None else [words])):
            assert edges(room).isnan().all()
        return delta[0], moments[0], int(skipped), None if words is None else words[0]

    def agrees(self) -> None:
        (want, kept, lost, _), (got, moments, skipped, embedded) = self.run(eager), self.run(moment_step)
        assert skipped == lost
        tolerance = TOLERANCE[want.dtype]
        for one, other in ((got, want), (moments, kept)):
            size = float(other.double().abs().amax()) if other.numel() else 0.0
            assert torch.allclose(one.double(), other.double(), rtol=tolerance, atol=tolerance * size), self.rule
        if self.embedding is not None:
            weight, ids, slot = self.embedding
            assert embedded is not None and torch.equal(embedded, embed(weight, ids, slot, got))


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 1, 33), (4, 129), (5,), (0, 3, 4), (2, 3, 0), (2, 90, 300)], ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_agrees_with_eager(direction: str, ball: str, shape: tuple[int, ...], dtypes: Any) -> None:
    for group, masked, epsilon in itertools.product(range(len(shape)), (False, True), (0.2, 5.0, None)):
        rule = {"direction": direction, "ball": ball, "group": group, "epsilon": epsilon}
        Case(*values(shape, dtypes), hidden(shape) if masked else None, **rule).agrees()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_runs_and_words(direction: str, ball: str, dtypes: Any) -> None:
    """Of a block and of several, of one position and of none, some not finite; with words, by position and by slot."""
    weight, ids = torch.randn(9, 33).to(dtypes[0]), torch.randint(9, (4, 300))
    for starts, masked in itertools.product(([0, 1, 1, 496, 497, 994, 1200], [0, 1200]), (False, True)):
        rule = {"direction": direction, "ball": ball, "epsilon": 0.2, "starts": starts}
        delta, grad = values((4, 300, 33), dtypes)
        Case(delta, grad, hidden(delta.shape) if masked else None, (weight, ids, None), **rule).agrees()
        grad[3, 299, 32] = math.nan
        Case(delta, grad, None, (weight, ids, None), **rule).agrees()
    slot = torch.randint(-1, 6, (4, 300))
    for group in (0, 1):
        rule = {"direction": direction, "ball": ball, "group": group}
        Case(*values((6, 33), dtypes), None, (weight, ids, slot), **rule).agrees()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_groups_that_are_not_finite(direction: str, ball: str, bad: float, dtypes: Any) -> None:
    delta, grad = values((5, 3, 67), dtypes)
    grad[1, 2, 66], grad[3, 0, 0], grad[4, 1, 5] = bad, bad, bad
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4, 1] = False
    for group, count in ((0, 1), (1, 2), (2, 2)):
        case = Case(delta, grad, mask, direction=direction, ball=ball, group=group)
        case.agrees()
        _, moments, skipped, _ = case.run(moment_step)
        assert skipped == count
        still = moments[:, [1, 3]] if group == 1 else moments[:, 1, 2] if group == 2 else moments
        assert torch.equal(
            still, case.moments[:, [1, 3]] if group == 1 else case.moments[:, 1, 2] if group == 2 else case.moments
        )


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-18, 1e18, 1e30, 3e37])
@pytest.mark.parametrize("direction", MOMENT_DIRECTIONS)
def test_tiny_and_huge_perturbations(direction: str, scale: float) -> None:
    """Beyond what a sum of squares holds: they are scaled, and come onto the ball."""
    for group in (0, 1, 2):
        delta, grad = values((3, 4, 300), (F32, F32))
        Case(delta * scale, grad, direction=direction, group=group).agrees()
        Case(delta * scale, grad, direction=direction, group=group, step_size=0.0, epsilon=scale).agrees()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), [("adam", "l2"), ("adamw", "linf"), ("rmsprop", "none")])
def test_threads_change_nothing(direction: str, ball: str, dtypes: Any) -> None:
    before = torch.get_num_threads()
    weight, ids, slot = torch.randn(50, 300).to(dtypes[0]), torch.randint(50, (600,)), torch.randint(-1, 700, (600,))
    cases = [
        Case(*values(shape, dtypes), hidden(shape), embedding, starts, direction=direction, ball=ball, group=group)
        for shape, group, embedding, starts in (
            ((700, 300), 0, (weight, ids, slot), None),
            ((3, 200, 300), 1, (weight, ids.view(3, 200), None), None),
            ((700, 300), 1, None, None),
            ((2, 250, 300), 1, None, [0, 1, 500]),
        )
    ]
    try:
        for case in cases:
            case.agrees()
            runs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                runs.append(case.run(moment_step))
            torch.set_num_threads(before)
            for found in runs[1:]:
                for one, other in zip(found, runs[0], strict=True):
                    assert one is other or (torch.equal(one, other) if isinstance(one, Tensor) else one == other)
    finally:
        torch.set_num_threads(before)


def test_strides_of_the_gradient() -> None:
    delta, wide = 0.1 * torch.randn(4, 6, 10), torch.randn(4, 6, 30)
    for grad in (wide[:, :, 7:17], torch.randn(10).expand(4, 6, 10), wide[:, :, ::3], torch.randn(6, 4, 10).mT.mT):
        if grad.shape != delta.shape:
            grad = grad.transpose(0, 1)
        found = []
        for given in (grad, grad.contiguous()):
            case = Case(delta, given, group=1)
            case.moments.fill_(0.01)
            found.append(case.run(moment_step))
        assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_moments_of_sixteen_bits_are_refused() -> None:
    case = Case(torch.zeros(2, 3), torch.ones(2, 3, dtype=F16))
    case.moments = case.moments.to(F16)
    with pytest.raises(TypeError, match="moments must be"):
        case.run(moment_step)


def test_indices_out_of_range_change_nothing() -> None:
    weight = torch.randn(5, 3)
    for ids, slot in ((torch.tensor([0, 5]), None), (torch.tensor([0, 1]), torch.tensor([0, 2]))):
        case = Case(torch.zeros(2, 3), torch.ones(2, 3), None, (weight, ids, slot))
        delta, moments, embedded = torch.zeros(2, 3), torch.zeros(2, 2, 3), torch.full((2, 3), 7.0)
        with pytest.raises(IndexError, match=r"moment_step: (id|slot)"):
            moment_step(
                delta, case.grad, None, torch.zeros((), dtype=torch.int64), moments, case.rule,
                Moments.of(case.rule, 1), Lookup(weight, ids, slot, embedded),
            )  # fmt: skip
        assert (delta == 0).all() and (moments == 0).all() and (embedded == 7).all()
