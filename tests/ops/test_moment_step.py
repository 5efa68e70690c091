"""`moment_step` against torch.optim, in every direction, ball and grouping."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastadv.arguments.moments import planes
from fastadv.arguments.rule import MOMENT_BALLS, MOMENT_DIRECTIONS
from fastadv.ops import moment_step

OPTIMIZERS: dict[str, Any] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
RULES = list(itertools.product(MOMENT_DIRECTIONS, MOMENT_BALLS))
STARTS = {12: [0, 5, 6, 6, 12], 4: [0, 0, 1, 4, 4], 2: [0, 2], 1: [0, 1], 3: [0, 3]}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Search:
    """A perturbation and its moments, here and in torch.optim (float64), over several steps."""

    def __init__(
        self, delta: Tensor, group: int, fused: bool | None, *, starts: list[int] | None = None, **rule: Any
    ) -> None:
        self.rule = {"step_size": 0.05, "epsilon": 0.4, "direction": "adam", "ball": "l2", "group": group} | rule
        self.delta, self.fused, self.skipped = delta.clone(), fused, torch.zeros((), dtype=torch.int64)
        self.moments = torch.zeros(planes(self.rule["direction"]), *delta.shape, dtype=wide(delta.dtype))
        self.starts = None if starts is None else torch.tensor(starts)
        self.mine = delta.double().clone().requires_grad_()
        optimizer = OPTIMIZERS[self.rule["direction"]]
        self.optimizer = optimizer([self.mine], lr=self.rule["step_size"], maximize=True)
        self.count = 0

    def step(self, grad: Tensor, mask: Tensor | None = None, **lookup: Any) -> None:
        self.count += 1
        moment_step(
            self.delta, grad, mask=mask, skipped=self.skipped, moments=self.moments, count=self.count,
            starts=self.starts, fused=self.fused, **self.rule, **lookup,
        )  # fmt: skip

    def step_theirs(self, grad: Tensor, mask: Tensor | None = None) -> None:
        self.mine.grad = grad.double() if mask is None else grad.double() * mask.unsqueeze(-1)
        self.optimizer.step()
        with torch.no_grad():
            for group in self.groups(self.mine):
                group.copy_(self.projected(group))

    def groups(self, delta: Tensor) -> list[Tensor]:
        rows = delta.view(-1, delta.shape[-1])
        if self.starts is not None:
            return [rows[a:b] for a, b in itertools.pairwise(self.starts.tolist()) if a < b]
        count = math.prod(delta.shape[: self.rule["group"]])
        return list(delta.view(count, -1)) if delta.numel() else []

    def projected(self, delta: Tensor) -> Tensor:
        epsilon, ball = self.rule["epsilon"], self.rule["ball"]
        if epsilon is None or ball == "none":
            return delta
        if ball == "linf":
            return delta.clamp(-epsilon, epsilon)
        return delta * min(1.0, epsilon / max(float(delta.norm()), 1e-300))

    def agrees(self, dtype: torch.dtype) -> None:
        error = float((self.delta.double() - self.mine).detach().norm())
        assert error <= TOLERANCE[dtype] * max(1.0, float(self.mine.detach().norm())), error


def engines(dtype: torch.dtype) -> tuple[bool | None, ...]:
    return (None, False) if dtype in {torch.float32, torch.float64} else (False,)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 7), (1, 1, 1), (4, 6), (1, 33)], ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_steps_as_torch_does(direction: str, ball: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Four steps of a search; gradients of each element's own size, which a norm of the whole would not forgive."""
    starts = STARTS[math.prod(shape[:-1])]
    for group, epsilon, fused in itertools.product((*range(len(shape)), None), (0.0, 0.1, None), engines(dtype)):
        options = {"direction": direction, "ball": ball, "epsilon": epsilon}
        search = Search(
            (0.1 * torch.randn(shape)).to(dtype), group or 0, fused, starts=starts if group is None else None, **options
        )
        sizes = 10 ** (4 * torch.rand(shape) - 2)
        for _ in range(4):
            grad = (sizes * torch.randn(shape)).to(dtype)
            search.step(grad)
            search.step_theirs(grad)
        assert search.skipped == 0
        assert search.delta.dtype == dtype
        search.agrees(dtype)


@settings(max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9)),
    st.sampled_from(RULES),
    st.integers(0, 2),
    st.integers(0, 2**31),
)
def test_masked_positions_have_no_gradient(shape: Any, rule: tuple[str, str], group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape[:2], generator=generator) < 0.6
    for fused in (None, False):
        start = 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) * mask.unsqueeze(-1)
        search = Search(start, group, fused, direction=rule[0], ball=rule[1])
        for _ in range(3):
            grad = torch.randn(shape, generator=generator, dtype=torch.float64)
            search.step(grad.masked_fill(~mask.unsqueeze(-1), math.nan), mask)
            search.step_theirs(grad, mask)
        assert search.skipped == 0
        search.agrees(torch.float64)
        assert (search.delta[~mask] == 0).all()
        assert (search.moments[:, ~mask] == 0).all()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("ball", MOMENT_BALLS)
@pytest.mark.parametrize("direction", MOMENT_DIRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_group_that_is_not_finite_keeps_its_moments_and_is_counted(
    bad: float, direction: str, ball: str, fused: bool | None
) -> None:
    """It comes onto the ball all the same; the others step."""
    for group, starts, stay in ((1, None, [1, 3]), (2, None, [3, 6]), (0, [0, 2, 4, 6, 8], [1, 3])):
        delta, grad = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
        search = Search(delta, group, fused, starts=starts, direction=direction, ball=ball)
        search.step(grad)
        before, moments = search.delta.clone(), search.moments.clone()
        grad[1, 1, 2], grad[3, 0, 0] = bad, bad
        search.step(grad)
        assert search.skipped == 2
        leading = (4, 6) if group == 1 or starts else (8, 3)
        still = torch.zeros(leading[0], dtype=torch.bool)
        still[stay] = True
        for now, was in zip(search.moments, moments, strict=True):
            assert torch.equal((now == was).view(leading).all(1), still)
            assert now.isfinite().all()
        close = search.delta.isclose(before, rtol=1e-6 if ball == "l2" else 0, atol=0)  # on the ball, but rounded
        assert close.view(leading)[still].all()
        assert not close.view(leading)[~still].all(1).any() or ball == "linf"  # whose edge may be where both steps end
        assert search.delta.isfinite().all()


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("ball", ["l2", "linf"])
def test_a_group_that_takes_no_step_comes_onto_the_ball(ball: str, fused: bool | None) -> None:
    search = Search(torch.full((2, 3, 5), 9.0), 1, fused, ball=ball)
    search.step(torch.full((2, 3, 5), math.nan))
    assert search.skipped == 2
    want = 0.4 / math.sqrt(15) if ball == "l2" else 0.4
    assert torch.allclose(search.delta, torch.tensor(want))
    assert (search.moments == 0).all()


@pytest.mark.parametrize("fused", [None, False])
def test_large_perturbations_are_projected_without_overflow(fused: bool | None) -> None:
    search = Search(torch.full((1, 4), 1e30), 1, fused, epsilon=2.0)
    search.step(torch.zeros(1, 4))
    assert torch.allclose(search.delta, torch.ones(1, 4))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_embeds_the_moved_perturbation(dtype: torch.dtype, fused: bool | None) -> None:
    weight, ids = torch.randn(7, 6).to(dtype), torch.randint(7, (2, 3))
    for starts in (None, [0, 1, 6]):
        search = Search(torch.randn(2, 3, 6, dtype=wide(dtype)), 1, fused, starts=starts)
        embedded = weight[ids] * math.nan
        search.step(torch.randn(2, 3, 6).to(dtype), weight=weight, ids=ids, embedded=embedded)
        assert torch.equal(embedded, (weight[ids].to(wide(dtype)) + search.delta).to(dtype))
    slot = torch.tensor([[0, -1, 1], [-1, 1, 0]])
    search, embedded = Search(torch.randn(2, 6, dtype=wide(dtype)), 0, fused), embedded * math.nan
    search.step(torch.randn(2, 6).to(dtype), weight=weight, ids=ids, slot=slot, embedded=embedded)
    added = torch.cat([search.delta, torch.zeros(1, 6, dtype=wide(dtype))])[slot]
    assert torch.equal(embedded, (weight[ids].to(wide(dtype)) + added).to(dtype))


@pytest.mark.parametrize("fused", [None, False])
def test_indices_out_of_range(fused: bool | None) -> None:
    search = Search(torch.zeros(2, 4), 0, fused)
    for ids, slot in ((torch.tensor([0, 5]), torch.tensor([0, 1])), (torch.tensor([0, 1]), torch.tensor([0, 2]))):
        with pytest.raises(IndexError):
            search.step(torch.ones(2, 4), weight=torch.ones(5, 4), ids=ids, slot=slot, embedded=torch.zeros(2, 4))


def test_empty() -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        search = Search(torch.zeros(shape), 1, None)
        search.step(torch.zeros(shape))
        assert search.skipped == 0


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"direction": "sign"}, "direction must be one of adam, adamw, rmsprop"),
        ({"ball": "unit"}, "ball must be one of l2, linf, none"),
        ({"group": 3}, "group must be from 0 to 2"),
        ({"count": 0}, "count must be at least 1"),
        ({"grad": torch.zeros(2, 3, 5)}, "must be equal"),
        ({"mask": torch.ones(2, 4).bool()}, "mask must be bool with shape"),
        ({"moments": torch.zeros(1, 2, 3, 4)}, "moments must have shape"),
        ({"moments": torch.zeros(())}, "moments must have shape"),
        ({"moments": torch.zeros(2, 2, 3, 5)}, "moments must have shape"),
        ({"direction": "rmsprop"}, "moments must have shape"),
        ({"starts": torch.tensor([[0, 6]])}, "starts must have shape"),
        ({"weight": torch.ones(5, 4)}, "belong together"),
    ],
)
def test_refuses(change: dict[str, Any], phrase: str, fused: bool | None) -> None:
    arguments: dict[str, Any] = {
        "grad": torch.ones(2, 3, 4), "skipped": torch.zeros((), dtype=torch.int64), "step_size": 1.0,
        "moments": torch.zeros(2, 2, 3, 4), "epsilon": 1.0, "direction": "adam", "ball": "l2", "group": 1, "count": 1,
        "fused": fused,
    }  # fmt: skip
    delta = torch.zeros(2, 3, 4)
    with pytest.raises((ValueError, TypeError), match=phrase):
        moment_step(delta, **(arguments | change))
    assert (delta == 0).all()


@pytest.mark.native  # on a GPU reading them would wait
@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("starts", [[0], [0, 5], [1, 6], [0, 4, 3, 6]], ids=str)
def test_refuses_runs_that_are_none(starts: list[int], fused: bool | None) -> None:
    test_refuses({"starts": torch.tensor(starts)}, "rise from 0 to the number of positions, 6", fused)


@pytest.mark.parametrize("form", ["plain", "position", "slot", "runs"])
@pytest.mark.parametrize("direction", MOMENT_DIRECTIONS)
def test_opcheck(direction: str, form: str) -> None:
    leading = (2,) if form == "slot" else (2, 3)
    arguments: tuple[object, ...] = (torch.zeros(*leading, 4), torch.randn(*leading, 4), torch.ones(leading).bool())
    arguments += (torch.zeros((), dtype=torch.int64), torch.zeros(planes(direction), *leading, 4))
    arguments += (0.1, 1.0, direction, "l2", 1, 2)
    if form == "runs":
        arguments += (None, None, None, None, torch.tensor([0, 1, 5, 6]))
    elif form != "plain":
        ids = torch.tensor([[0, 1, 4], [2, 2, 0]])
        slot = torch.tensor([[0, 1, -1], [1, 1, 0]]) if form == "slot" else None
        arguments += (torch.randn(5, 4), ids, slot, torch.zeros(2, 3, 4))
    torch.library.opcheck(torch.ops.fastadv.moment_step.default, arguments)


def test_bumps_versions() -> None:
    search = Search(torch.zeros(2, 3), 1, None)
    versions = [one._version for one in (search.delta, search.moments, search.skipped)]
    search.step(torch.ones(2, 3))
    after = [one._version for one in (search.delta, search.moments, search.skipped)]
    assert all(now > was for now, was in zip(after, versions, strict=True))
