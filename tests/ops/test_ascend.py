"""`ascend` against float64 formulas, in every direction, ball and grouping."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastadv.arguments.rule import BALLS, DIRECTIONS
from fastadv.ops.ascend import ascend

SHAPES = [(3, 5, 7), (1, 1, 1), (2, 1, 4), (4, 6), (1, 33)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def formula(delta: Tensor, grad: Tensor, step: float, epsilon: float | None, direction: str, ball: str) -> Tensor:
    """One group, from the papers: no scaling tricks, no batching."""
    norm = {"l2": grad.norm(), "max": grad.abs().max(), "sign": grad.abs().max()}[direction]
    if norm == 0:
        moved = delta
    elif direction == "sign":
        moved = delta + step * grad.sign()
    else:
        moved = delta + step * grad / norm
    if epsilon is None or ball == "none":
        return moved
    if ball == "linf":
        return moved.clamp(-epsilon, epsilon)
    size = moved.norm() if ball == "l2" or direction == "l2" else moved.abs().max()
    if size == 0 or (ball == "l2" and size <= epsilon):
        return moved
    return moved * epsilon / size


def oracle(delta: Tensor, grad: Tensor, group: int, **rule: object) -> Tensor:
    count = math.prod(delta.shape[:group])
    pairs = zip(delta.double().reshape(count, -1), grad.double().reshape(count, -1), strict=True)
    return torch.stack([formula(d, g, **rule) for d, g in pairs]).reshape(delta.shape)  # type: ignore[arg-type]


def run(delta: Tensor, grad: Tensor, group: int, mask: Tensor | None = None, **rule: object) -> tuple[Tensor, int]:
    fused = None if delta.dtype in {torch.float32, torch.float64} else False
    return run_on(fused, delta, grad, group, mask, **rule)


def run_on(
    fused: bool | None, delta: Tensor, grad: Tensor, group: int, mask: Tensor | None = None, **rule: object
) -> tuple[Tensor, int]:
    moved, skipped = delta.clone(), torch.zeros((), dtype=torch.int64)
    names = {"step": "step_size"}
    arguments = {names.get(name, name): value for name, value in rule.items()}
    ascend(moved, grad, mask=mask, skipped=skipped, group=group, fused=fused, **arguments)  # type: ignore[arg-type]
    return moved, int(skipped)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), list(itertools.product(DIRECTIONS, BALLS)))
def test_formula(direction: str, ball: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for group, epsilon in itertools.product(range(len(shape)), (0.0, 0.2, 5.0, None)):
        delta, grad = (0.1 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        rule = {"step": 0.3, "epsilon": epsilon, "direction": direction, "ball": ball}
        want = oracle(delta, grad, group, **rule)
        for fused in (None, False) if dtype in {torch.float32, torch.float64} else (False,):
            moved, skipped = run_on(fused, delta, grad, group, **rule)
            assert skipped == 0
            assert moved.dtype == dtype
            assert (moved.double() - want).norm() <= TOLERANCE[dtype] * max(1.0, float(want.norm()))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("direction", ["l2", "max"])
def test_direction_of_tiny_and_huge_gradients(direction: str, scale: float) -> None:
    unit = torch.rand(2, 3, 4) - 0.5
    moved, skipped = run(
        torch.zeros(2, 3, 4), unit * scale, 1, step=1.0, epsilon=None, direction=direction, ball="none"
    )
    want = oracle(torch.zeros(2, 3, 4), unit, 1, step=1.0, epsilon=None, direction=direction, ball="none")
    assert skipped == 0
    assert torch.allclose(moved.double(), want, atol=1e-5 if scale > 1e-38 else 1e-4)  # 1e-40 is denormal


def test_large_perturbation_is_projected_without_overflow() -> None:
    moved, _ = run(torch.full((1, 4), 1e30), torch.zeros(1, 4), 1, step=1.0, epsilon=2.0, direction="l2", ball="l2")
    assert torch.allclose(moved, torch.ones(1, 4))


def test_step_back_onto_zero() -> None:
    """delta is -step * g / |g|: the sum of squares cancels to zero or to rounding."""
    grad = torch.randn(3, 8)
    delta = -0.3 * grad / grad.norm(dim=1, keepdim=True)
    moved, _ = run(delta, grad, 1, step=0.3, epsilon=0.5, direction="l2", ball="l2")
    assert moved.isfinite().all()
    assert moved.norm() < 1e-6


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_group_with_a_non_finite_element_takes_no_step_and_is_counted(direction: str, bad: float) -> None:
    delta, grad = torch.zeros(4, 2, 3), torch.randn(4, 2, 3)
    grad[1, 1, 2], grad[3, 0, 0] = bad, bad
    rule = {"step": 0.1, "epsilon": 1.0, "direction": direction, "ball": "none"}
    moved, skipped = run(delta, grad, 1, **rule)
    assert skipped == 2
    assert (moved[[1, 3]] == 0).all()
    assert torch.allclose(moved[[0, 2]].double(), oracle(delta[[0, 2]], grad[[0, 2]], 1, **rule), atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_group_without_a_gradient_stays(direction: str) -> None:
    delta = 0.1 * torch.randn(2, 3)
    moved, skipped = run(delta, torch.zeros(2, 3), 1, step=1.0, epsilon=1.0, direction=direction, ball="l2")
    assert torch.equal(moved, delta)
    assert skipped == 0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mask_hides_gradients_even_those_that_are_not_numbers(direction: str) -> None:
    grad, mask = torch.randn(2, 4, 3), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    rule = {"step": 0.1, "epsilon": 1.0, "direction": direction, "ball": "l2"}
    want, _ = run(torch.zeros(2, 4, 3), grad * mask.unsqueeze(-1), 1, **rule)
    grad[1, 2:] = math.nan
    moved, skipped = run(torch.zeros(2, 4, 3), grad, 1, mask, **rule)
    assert skipped == 0
    assert torch.equal(moved, want)
    assert (moved[1, 2:] == 0).all()


# Groups that are runs of positions: of one position, of none, across samples.
RUNS = {12: [0, 5, 6, 6, 12], 4: [0, 0, 1, 4, 4], 1: [0, 1]}


def by_runs(delta: Tensor, grad: Tensor, starts: list[int], **rule: object) -> Tensor:
    """Each run by the formula."""
    rows, along = (x.double().reshape(-1, x.shape[-1]) for x in (delta, grad))
    found = [formula(rows[a:b], along[a:b], **rule) for a, b in itertools.pairwise(starts) if a < b]  # type: ignore[arg-type]
    return torch.cat(found).reshape(delta.shape)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(3, 4, 7), (4, 6), (33,)], ids=str)
@pytest.mark.parametrize(("direction", "ball"), list(itertools.product(DIRECTIONS, BALLS)))
def test_runs_of_positions(direction: str, ball: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    starts = RUNS[math.prod(shape[:-1])]
    for epsilon, masked in ((0.2, True), (5.0, False), (None, False)):
        delta, grad = (0.1 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
        mask = torch.rand(shape[:-1]) < 0.7 if masked else None
        rule = {"step": 0.3, "epsilon": epsilon, "direction": direction, "ball": ball}
        want = by_runs(delta, grad if mask is None else grad * mask.unsqueeze(-1), starts, **rule)
        for fused in (None, False) if dtype in {torch.float32, torch.float64} else (False,):
            moved, skipped = run_on(fused, delta, grad, 0, mask, starts=torch.tensor(starts), **rule)
            assert skipped == 0
            assert (moved.double() - want).norm() <= TOLERANCE[dtype] * max(1.0, float(want.norm()))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_run_with_a_non_finite_element_takes_no_step_and_is_counted(
    direction: str, bad: float, fused: bool | None
) -> None:
    starts = torch.tensor([0, 3, 3, 4, 7, 8])
    delta, grad = torch.zeros(2, 4, 3), torch.randn(2, 4, 3)
    grad[0, 1, 2], grad[1, 3, 0] = bad, bad
    rule = {"step": 0.1, "epsilon": 1.0, "direction": direction, "ball": "none"}
    moved, skipped = run_on(fused, delta, grad, 1, starts=starts, **rule)
    assert skipped == 2
    assert (moved != 0).all(-1).flatten().tolist() == [False] * 3 + [True] * 4 + [False]
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[0, 1] = False
    _, skipped = run_on(fused, delta, grad, 1, mask, starts=starts, **rule)
    assert skipped == 1


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("direction", ["l2", "max"])
def test_each_run_has_its_own_scale(direction: str, scale: float, fused: bool | None) -> None:
    unit, starts = torch.rand(2, 3, 4) - 0.5, [0, 2, 6]
    grad = unit.clone()
    grad[0, :2] *= scale
    rule = {"step": 1.0, "epsilon": None, "direction": direction, "ball": "none"}
    moved, skipped = run_on(fused, torch.zeros(2, 3, 4), grad, 1, starts=torch.tensor(starts), **rule)
    assert skipped == 0
    assert torch.allclose(moved.double(), by_runs(torch.zeros(2, 3, 4), unit, starts, **rule), atol=1e-5)


def test_empty() -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        moved, skipped = run(
            torch.zeros(shape), torch.zeros(shape), 1, step=1.0, epsilon=1.0, direction="l2", ball="l2"
        )
        assert moved.shape == shape
        assert skipped == 0


def test_writes_through_a_view_and_bumps_its_version() -> None:
    room = torch.full((4, 6), 7.0)
    delta = room[1:3, ::2]
    version = room._version
    ascend(
        delta.zero_(), torch.ones(2, 3), skipped=torch.zeros((), dtype=torch.int64), step_size=1.0, epsilon=None,
        direction="sign", ball="none", group=1, fused=False,
    )  # fmt: skip
    assert torch.equal(delta, torch.ones(2, 3))
    assert (room[0] == 7).all() and (room[3] == 7).all() and (room[1:3, 1::2] == 7).all()
    assert room._version > version + 1


EMBEDS = {
    "weight": torch.ones(5, 4), "ids": torch.zeros(2, 3, dtype=torch.int64), "embedded": torch.ones(2, 3, 4)
}  # fmt: skip


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_embeds_the_moved_perturbation(dtype: torch.dtype, fused: bool | None) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    weight, ids = torch.randn(7, 6).to(dtype), torch.randint(7, (2, 3))
    rule = {"step": 0.3, "epsilon": 0.2, "direction": "l2", "ball": "l2"}
    delta, grad, embedded = torch.randn(2, 3, 6, dtype=wide), torch.randn(2, 3, 6, dtype=wide), weight[ids] * math.nan
    for starts in (None, torch.tensor([0, 1, 6])):
        moved, _ = run_on(fused, delta, grad, 1, weight=weight, ids=ids, embedded=embedded, starts=starts, **rule)
        assert torch.equal(embedded, (weight[ids].to(wide) + moved).to(dtype))
    slot = torch.tensor([[0, -1, 1], [-1, 1, 0]])
    rows, embedded = torch.randn(2, 6, dtype=wide), embedded * math.nan
    moved, _ = run_on(fused, rows, grad[0, :2], 0, weight=weight, ids=ids, slot=slot, embedded=embedded, **rule)
    added = torch.cat([moved, torch.zeros(1, 6, dtype=wide)])[slot]
    assert torch.equal(embedded, (weight[ids].to(wide) + added).to(dtype))


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("slot", [[0, -2, 1], [0, 2, 1]])
def test_slots_and_ids_out_of_range(slot: list[int], fused: bool | None) -> None:
    delta, embedded = torch.zeros(2, 4), torch.zeros(3, 4)
    rule = {"step": 0.3, "epsilon": 0.2, "direction": "l2", "ball": "l2"}
    for ids, rows in (
        (torch.tensor([0, 1, 2]), torch.tensor(slot)),
        (torch.tensor([0, 1, 5]), torch.tensor([0, 0, 0])),
    ):
        with pytest.raises(IndexError):
            run_on(fused, delta, delta, 0, weight=torch.ones(5, 4), ids=ids, slot=rows, embedded=embedded, **rule)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"direction": "l1"}, "direction must be one of"),
        ({"ball": "l1"}, "ball must be one of"),
        ({"group": 3}, "group must be from 0 to 2"),
        ({"grad": torch.zeros(2, 3, 5)}, "must be equal"),
        ({"mask": torch.ones(2, 4).bool()}, "mask must be bool with shape"),
        ({"mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"starts": torch.tensor([[0, 6]])}, "starts must have shape"),
        ({"starts": torch.tensor([], dtype=torch.int64)}, "starts must have shape"),
        ({"starts": torch.tensor([0, 6]).int()}, "starts must be int64"),
        ({"starts": torch.tensor([0.0, 6.0])}, "starts must be int64"),
        ({"weight": torch.ones(5, 4)}, "belong together"),
        ({"slot": torch.zeros(2, 3).long()}, "belong together"),
        (EMBEDS | {"embedded": torch.ones(2, 3, 5)}, "embedded must have shape"),
        (EMBEDS | {"embedded": torch.ones(2, 3, 4).double()}, "embedded must be"),
        (EMBEDS | {"ids": torch.zeros(6).long(), "embedded": torch.ones(6, 4)}, "without slot"),
        (EMBEDS | {"slot": torch.zeros(2, 3).long()}, "with slot"),
    ],
)
def test_refuses(change: dict[str, object], phrase: str, fused: bool | None) -> None:
    arguments = {
        "grad": torch.ones(2, 3, 4), "skipped": torch.zeros((), dtype=torch.int64), "step_size": 1.0,
        "epsilon": 1.0, "direction": "l2", "ball": "l2", "group": 1, "fused": fused,
    }  # fmt: skip
    delta = torch.zeros(2, 3, 4)
    with pytest.raises((ValueError, TypeError), match=phrase):
        ascend(delta, **(arguments | change))  # type: ignore[arg-type]
    assert (delta == 0).all()


@pytest.mark.native  # on a GPU reading them would wait
@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("place", [{}, EMBEDS], ids=["plain", "embeds"])
@pytest.mark.parametrize("starts", [[0], [0, 5], [0, 7], [1, 6], [0, 4, 3, 6], [0, 2**62, 6]], ids=str)
def test_refuses_runs_that_are_none(starts: list[int], place: dict[str, object], fused: bool | None) -> None:
    change = place | {"starts": torch.tensor(starts)}
    test_refuses(change, "rise from 0 to the number of positions, 6", fused)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["plain", "position", "slot", "runs"])
def test_opcheck(form: str, masked: bool) -> None:
    leading = (2,) if form == "slot" else (2, 3)
    mask = torch.ones(leading, dtype=torch.bool) if masked else None
    arguments: tuple[object, ...] = (torch.zeros(*leading, 4), torch.randn(*leading, 4), mask)
    arguments += (torch.zeros((), dtype=torch.int64), 0.1, 1.0, "l2", "l2", 1)
    if form == "runs":
        arguments += (None, None, None, None, torch.tensor([0, 1, 5, 6]))
    elif form != "plain":
        ids = torch.tensor([[0, 1, 4], [2, 2, 0]])
        slot = torch.tensor([[0, 1, -1], [1, 1, 0]]) if form == "slot" else None
        arguments += (torch.randn(5, 4), ids, slot, torch.zeros(2, 3, 4))
    torch.library.opcheck(torch.ops.fastadv.ascend.default, arguments)
