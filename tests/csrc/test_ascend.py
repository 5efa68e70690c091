"""The native launcher against the eager op: every rule, dtype and form, and what it must refuse."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastadv import native
from fastadv.arguments.rule import BALLS, DIRECTIONS
from fastadv.native.ascend import ascend as native_ascend
from fastadv.ops.ascend import eager as eager_ascend
from tests.flat import ascends

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")

ascend, eager = ascends(native_ascend), ascends(eager_ascend)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (F32, BF16), (F32, F16)]  # of delta and of the gradient
TOLERANCE = {F32: 2e-6, F64: 1e-14}
SHAPES = [(3, 5, 7), (1, 1, 1), (2, 1, 33), (4, 129), (1, 1), (5,), (0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 9, 300)]
RULES = list(itertools.product(DIRECTIONS, BALLS))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """A contiguous copy inside a larger buffer of NaN (True, or the largest integer), and that buffer."""
    edge = math.nan if values.dtype.is_floating_point else torch.iinfo(torch.int64).max
    room = torch.full((values.numel() + 128,), edge, dtype=F32 if values.dtype == torch.bool else values.dtype)
    if values.dtype == torch.bool:
        room = torch.ones(values.numel() + 128, dtype=torch.bool)
    inner = room[64 : 64 + values.numel()].view(values.shape)
    inner.copy_(values)
    return inner, room


def edges(room: Tensor) -> Tensor:
    return torch.cat([room[:64], room[-64:]])


class Case:
    """One call: runs both versions on copies and compares them."""

    def __init__(
        self, delta: Tensor, grad: Tensor, mask: Tensor | None = None, embedding: tuple[Any, ...] | None = None,
        starts: list[int] | None = None, **rule: Any,
    ) -> None:  # fmt: skip
        self.delta, self.grad, self.mask, self.embedding = delta, grad, mask, embedding
        self.starts = None if starts is None else torch.tensor(starts)
        self.rule = {"step_size": 0.3, "epsilon": 0.5, "direction": "l2", "ball": "l2", "group": 0} | rule

    def eager(self, **change: Any) -> tuple[Tensor, int]:
        moved, skipped = self.delta.clone(), torch.zeros((), dtype=torch.int64)
        eager(moved, self.grad, self.mask, skipped, **(self.rule | change), starts=self.starts)
        return moved, int(skipped)

    def native(self) -> tuple[Tensor, int, Tensor | None]:
        skipped, embedded = torch.zeros((), dtype=torch.int64), None
        delta, grad = guarded(self.delta), guarded(self.grad)
        mask = None if self.mask is None else guarded(self.mask)
        if self.embedding is None:
            ascend(delta[0], grad[0], mask and mask[0], skipped, **self.rule, starts=self.starts)
        else:
            weight, ids, slot = self.embedding
            out = guarded(torch.full((*ids.shape, weight.shape[1]), math.nan, dtype=weight.dtype))
            ascend(delta[0], grad[0], mask and mask[0], skipped, **self.rule, weight=weight, ids=ids, slot=slot,
                   embedded=out[0], starts=self.starts)  # fmt: skip
            embedded = out[0]
            assert edges(out[1]).isnan().all()
        assert edges(delta[1]).isnan().all() and edges(grad[1]).isnan().all()
        return delta[0], int(skipped), embedded

    def by_group(self, x: Tensor) -> Tensor:
        if self.starts is None:
            return x.double().reshape(math.prod(x.shape[: self.rule["group"]]), -1)
        lengths = self.starts.diff()
        runs = torch.split(x.double().reshape(-1, x.shape[-1]), lengths[lengths > 0].tolist())
        return torch.nn.utils.rnn.pad_sequence(list(runs), batch_first=True).flatten(1)

    def agrees(self) -> None:
        (want, want_skipped), (got, skipped, embedded) = self.eager(), self.native()
        assert skipped == want_skipped
        if self.embedding is not None:
            weight, ids, slot = self.embedding
            assert embedded is not None
            assert torch.equal(embedded, embed(weight, ids, slot, got))
        if want.numel() == 0:
            return
        if self.rule["ball"] != "l2" and (self.rule["direction"] != "l2"):  # no sums, so no rounding of sums
            assert torch.equal(got, want), (got - want).abs().max()
            return
        # An error of the last bits of delta and step, brought onto the ball with them.
        moved, _ = self.eager(ball="none")
        before, after, at, there = map(self.by_group, (self.delta, want, moved, got))
        size = before.abs().amax(1) + (at - before).abs().amax(1)
        stretch = after.abs().amax(1) / at.abs().amax(1).clamp(min=1e-300)
        bound = TOLERANCE[want.dtype] * torch.maximum(size * stretch.clamp(max=1e300), after.abs().amax(1))
        error = (there - after).abs().amax(1)
        assert (error <= bound + 4 * torch.finfo(want.dtype).smallest_normal).all(), (error / bound, self.rule)


def embed(weight: Tensor, ids: Tensor, slot: Tensor | None, delta: Tensor) -> Tensor:
    rows = weight[ids.long()]
    if slot is not None:
        delta = torch.cat([delta, delta.new_zeros(1, delta.shape[1])])[slot]
    return (rows.to(delta.dtype) + delta).to(weight.dtype)


def values(shape: tuple[int, ...], dtypes: tuple[torch.dtype, torch.dtype], size: float = 1.0) -> tuple[Tensor, Tensor]:
    delta = 0.1 * torch.randn(shape, dtype=F64)
    return delta.to(dtypes[0]), (size * torch.randn(shape, dtype=F64)).to(dtypes[1])


def hidden(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape[:-1]) < 0.6


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_agrees_with_eager(direction: str, ball: str, shape: tuple[int, ...], dtypes: Any) -> None:
    for group, masked, epsilon in itertools.product(range(len(shape)), (False, True), (0.2, 5.0, None)):
        rule = {"direction": direction, "ball": ball, "group": group, "epsilon": epsilon}
        Case(*values(shape, dtypes), hidden(shape) if masked else None, **rule).agrees()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_runs_agree_with_eager(direction: str, ball: str, dtypes: Any) -> None:
    """Of a block and of several, of one position and of none."""
    weight, ids = torch.randn(9, 33).to(dtypes[0]), torch.randint(9, (4, 300))
    for shape, starts in (
        ((4, 300, 33), [0, 1, 1, 496, 497, 994, 1200]),
        ((1, 1, 5), [0, 0, 1]),
        ((3, 5, 7), [0, 15]),
        ((2, 0, 4), [0]),
        ((2, 0, 4), [0, 0]),
        ((6, 1), [0, 2, 6]),
    ):
        for epsilon, masked in itertools.product((0.2, None), (False, True)):
            rule = {"direction": direction, "ball": ball, "epsilon": epsilon, "starts": starts}
            embedding = (weight, ids, None) if shape[-1] == 33 else None
            delta, grad = values(shape, dtypes)
            Case(delta, grad, hidden(shape) if masked else None, embedding, **rule).agrees()
            if grad.numel() > 5:
                grad.view(-1)[-1] = math.nan
                Case(delta, grad, None, embedding, **rule).agrees()


@pytest.mark.parametrize("weight_dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("form", ["position", "slot"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_embeds_as_gather_perturb_does(direction: str, form: str, weight_dtype: torch.dtype) -> None:
    dtypes = (F64, F64) if weight_dtype == F64 else (F32, F32)
    for shape, dim, group, masked in itertools.product([(3, 5), (1,), (4, 0), ()], (1, 33, 129), (0, 1), (False, True)):
        weight = torch.randn(11, dim + 3, dtype=F64).to(weight_dtype)[:, 1 : dim + 1]
        ids = torch.randint(11, shape, dtype=torch.int32 if masked else torch.int64)
        slot = torch.randint(-1, 6, shape) if form == "slot" else None
        leading = (6,) if form == "slot" else shape
        if group > len(leading):
            continue
        mask = hidden((*leading, dim)) if masked else None
        group = min(group, len(leading))
        Case(*values((*leading, dim), dtypes), mask, (weight, ids, slot), direction=direction, group=group).agrees()


def test_a_table_without_rows_still_embeds() -> None:
    ids, slot = torch.tensor([1, 0, 1]), torch.full((3,), -1)
    for ball in BALLS:
        Case(torch.zeros(0, 4), torch.zeros(0, 4), None, (torch.randn(2, 4), ids, slot), ball=ball).agrees()


@pytest.mark.parametrize(("direction", "ball"), RULES)
@pytest.mark.parametrize(
    ("dtype", "size"),
    [(F32, 1e30), (F32, 1e-30), (F32, 1e-42), (F32, 3e37), (F64, 1e200), (F64, 1e-200), (F64, 1e-310), (F64, 1e300)],
)
def test_tiny_and_huge_gradients(direction: str, ball: str, dtype: torch.dtype, size: float) -> None:
    for group, scale in itertools.product((0, 1, 2), (1.0, 0.0, 1e-36, 1e36)):
        delta, grad = values((3, 4, 40), (dtype, dtype), size)
        Case(delta * scale, grad, hidden((3, 4, 40)), direction=direction, ball=ball, group=group).agrees()


def test_huge_gradients_of_sixteen_bits() -> None:
    for dtype, size in ((BF16, 1e38), (BF16, 1e-38), (F16, 6e4), (F16, 1e-7)):
        grad = (size * (torch.rand(3, 300) - 0.5)).to(dtype)
        for direction, ball in RULES:
            Case(torch.randn(3, 300), grad, direction=direction, ball=ball, group=1).agrees()


@pytest.mark.parametrize(("direction", "ball"), RULES)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_groups_that_are_not_finite(direction: str, ball: str, dtypes: Any, bad: float) -> None:
    delta, grad = values((5, 3, 67), dtypes)
    grad[1, 2, 66], grad[3, 0, 0], grad[4, 1, 5] = bad, bad, bad
    mask = torch.ones(5, 3, dtype=torch.bool)
    mask[4, 1] = False
    for group, count in ((0, 1), (1, 2), (2, 2)):
        case = Case(delta, grad, mask, direction=direction, ball=ball, group=group)
        case.agrees()
        assert case.native()[1] == count


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("ball", ["l2", "unit"])
@pytest.mark.parametrize("left", [0.0, 1e-12, 1e-7, 1e-4, 0.01, 0.1, 0.2, 0.3, 0.5])
def test_delta_nearly_undoes_the_step(dtype: torch.dtype, ball: str, left: float) -> None:
    """The norm after the step is a difference of nearly equal numbers, and `unit` divides by it."""
    grad = torch.randn(4, 500, dtype=dtype)
    delta = -0.3 * grad / grad.norm(dim=1, keepdim=True) * (1 - left)
    delta += 0.3 * left / math.sqrt(500) * torch.randn_like(delta)
    for epsilon in (0.3, 1e-3, 1e-9):
        case = Case(delta, grad, ball=ball, group=1, epsilon=epsilon)
        moved, norm = case.eager(ball="none")[0].double(), case.native()[0].double().norm(dim=1)
        want = torch.full((4,), epsilon, dtype=F64)
        if ball == "l2":
            want = moved.norm(dim=1).clamp(max=epsilon)
        rounding = 2 * TOLERANCE[dtype] * want + torch.finfo(dtype).eps * (ball == "l2")
        assert ((norm - want).abs() <= rounding).logical_or(norm == 0).all()
        if left >= 1e-4:  # below, what is left is rounding
            case.agrees()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_threads_change_nothing(direction: str, ball: str, dtypes: Any) -> None:
    before = torch.get_num_threads()
    weight, ids, slot = torch.randn(50, 300).to(dtypes[0]), torch.randint(50, (600,)), torch.randint(-1, 700, (600,))
    cases = [
        Case(
            *values(shape, dtypes, size), hidden(shape), embedding, starts, direction=direction, ball=ball, group=group
        )
        for size in (1.0, 1e-3 if dtypes[1] == F16 else 1e-36)
        for shape, group, embedding, starts in (
            ((700, 300), 0, (weight, ids, slot), None),
            ((2, 250, 300), 1, None, None),
            ((3, 200, 300), 1, (weight, ids.view(3, 200), None), None),
            ((700, 300), 1, None, None),
            ((2, 250, 300), 1, None, [0, 1, 500]),
            ((3, 200, 300), 1, (weight, ids.view(3, 200), None), [0, 7, 7, 8, 300, 460, 600]),
        )
    ]
    try:
        for case in cases:
            case.agrees()
            runs = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                runs.append(case.native())
            torch.set_num_threads(before)
            for delta, skipped, embedded in runs[1:]:
                assert torch.equal(delta, runs[0][0])
                assert skipped == runs[0][1]
                assert embedded is None or (runs[0][2] is not None and torch.equal(embedded, runs[0][2]))
    finally:
        torch.set_num_threads(before)


def test_strides_of_the_gradient_the_mask_and_the_indices() -> None:
    delta = 0.1 * torch.randn(4, 6, 10)
    wide, mask = torch.randn(4, 6, 30), hidden((6, 4, 10)).T
    gradients = {
        "slice of rows": wide[:, :, 7:17],
        "expanded": torch.randn(10).expand(4, 6, 10),
        "expanded rows": torch.randn(4, 1, 10).expand(4, 6, 10),
        "inner stride": wide[:, :, ::3],
        "transposed": torch.randn(6, 4, 10).transpose(0, 1),
        "scalar": torch.randn(()).expand(4, 6, 10),
        "sliced tokens": torch.randn(4, 9, 10)[:, :6],
    }
    for name, grad in gradients.items():
        for given_mask in (None, mask):
            skipped, moved = torch.zeros((), dtype=torch.int64), delta.clone()
            ascend(moved, grad, given_mask, skipped, 0.3, 0.5, "l2", "l2", 1)
            want = Case(delta, grad.contiguous(), given_mask, group=1).native()[0]
            assert torch.equal(moved, want), name
    column = torch.randn(3, 1), torch.randn(3, 5)[:, 2:3]
    Case(*column, group=1).agrees()
    ids, slot = torch.randint(5, (4, 3)).T, torch.randint(-1, 4, (4, 3)).T
    Case(*values((4, 10), (F32, F32)), None, (torch.randn(5, 10), ids, slot)).agrees()


def test_versions_of_what_is_mutated() -> None:
    delta, grad, skipped = torch.zeros(2, 3), torch.ones(2, 3), torch.zeros((), dtype=torch.int64)
    weight, ids, embedded = torch.randn(4, 3), torch.tensor([1, 2]), torch.empty(2, 3)
    ascend(delta, grad, None, skipped, 0.3, 0.5, "l2", "l2", 1)
    assert [t._version for t in (delta, grad, skipped)] == [1, 0, 1]
    ascend(delta, grad, None, skipped, 0.3, 0.5, "l2", "l2", 1, weight, ids, None, embedded)
    assert [t._version for t in (delta, skipped, embedded, grad, weight, ids)] == [2, 2, 1, 0, 0, 0]


def test_indices_out_of_range_change_nothing() -> None:
    weight, grad = torch.randn(5, 3), torch.randn(2, 3)
    bad = [
        (torch.tensor([0, 5]), None, "id 5 at position 1 .* 5 rows"),
        (torch.tensor([-1, 0]), None, "id -1 at position 0"),
        (torch.tensor([0, 1]), torch.tensor([0, -2]), "slot -2 at position 1 .* 2 rows"),
        (torch.tensor([0, 1]), torch.tensor([2, 0]), "slot 2 at position 0"),
    ]
    for ids, slot, message in bad:
        delta, embedded, skipped = torch.zeros(2, 3), torch.full((2, 3), 7.0), torch.zeros((), dtype=torch.int64)
        grad[0, 0] = math.nan
        with pytest.raises(IndexError, match=message):
            ascend(delta, grad, None, skipped, 0.3, 0.5, "l2", "l2", 1, weight, ids, slot, embedded)
        assert (delta == 0).all() and (embedded == 7).all() and skipped == 0


FIT: dict[str, Any] = {
    "delta": torch.zeros(2, 3), "grad": torch.ones(2, 3), "mask": None, "skipped": torch.zeros((), dtype=torch.int64),
    "step_size": 0.1, "epsilon": 1.0, "direction": "l2", "ball": "l2", "group": 1,
}  # fmt: skip
EMBEDS = FIT | {"weight": torch.zeros(5, 3), "ids": torch.tensor([0, 1]), "embedded": torch.zeros(2, 3)}
SLOT = torch.tensor([0, 1])
REFUSED = {
    "direction": (FIT | {"direction": "l1"}, ValueError, "direction must be one of"),
    "ball": (FIT | {"ball": "l1"}, ValueError, "ball must be one of"),
    "group": (FIT | {"group": 2}, ValueError, "group must be from 0 to 1"),
    "negative group": (FIT | {"group": -1}, ValueError, "group must be"),
    "delta 0-d": (FIT | {"delta": torch.zeros(()), "grad": torch.zeros(()), "group": 0}, ValueError, "group"),
    "delta dtype": (FIT | {"delta": torch.zeros(2, 3).half()}, TypeError, "float32 or float64"),
    "delta strides": (FIT | {"delta": torch.zeros(3, 2).T}, ValueError, r"delta\.contiguous\(\)"),
    "delta expanded": (FIT | {"delta": torch.zeros(3).expand(2, 3)}, ValueError, "contiguous"),
    "grad sparse": (FIT | {"grad": torch.ones(2, 3).to_sparse()}, TypeError, "no plain memory"),
    "delta device": (FIT | {"delta": torch.zeros(2, 3, device="meta")}, RuntimeError, "CPU alone.* on meta"),
    "grad dtype": (FIT | {"grad": torch.ones(2, 3).double()}, TypeError, "does not go with"),
    "grad integer": (FIT | {"grad": torch.ones(2, 3).int()}, TypeError, "must be one of"),
    "delta double, grad half": (FIT | {"delta": torch.zeros(2, 3).double(), "grad": torch.ones(2, 3).half()},
                                TypeError, "does not go with"),
    "grad shape": (FIT | {"grad": torch.ones(2, 4)}, ValueError, "must be equal"),
    "grad device": (FIT | {"grad": torch.ones(2, 3, device="meta")}, ValueError, "grad is on meta"),
    "mask dtype": (FIT | {"mask": torch.ones(2)}, ValueError, "mask must be bool"),
    "mask shape": (FIT | {"mask": torch.ones(2, 3).bool()}, ValueError, "mask must be bool with shape"),
    "mask device": (FIT | {"mask": torch.ones(2, device="meta").bool()}, ValueError, "mask is on meta"),
    "skipped dtype": (FIT | {"skipped": torch.zeros((), dtype=torch.int32)}, TypeError, "int64"),
    "skipped shape": (FIT | {"skipped": torch.zeros(1, dtype=torch.int64)}, ValueError, "0-d"),
    "starts dtype": (FIT | {"starts": torch.tensor([0, 2]).int()}, TypeError, "int64"),
    "starts device": (FIT | {"starts": torch.tensor([0, 2], device="meta")}, ValueError, "starts is on meta"),
    "starts short": (FIT | {"starts": torch.tensor([0, 1])}, ValueError, "rise from 0 to the number of positions, 2"),
    "starts fall": (FIT | {"starts": torch.tensor([0, 2, 1, 2])}, ValueError, "rise from 0"),
    "weight alone": (FIT | {"weight": torch.zeros(5, 3)}, ValueError, "belong together"),
    "slot alone": (FIT | {"slot": SLOT}, ValueError, "belong together"),
    "weight dtype": (EMBEDS | {"weight": torch.zeros(5, 3).double()}, TypeError, "does not go with"),
    "weight shape": (EMBEDS | {"weight": torch.zeros(5, 4)}, ValueError, r"weight must have shape \[V, 3\]"),
    "weight strides": (EMBEDS | {"weight": torch.zeros(3, 5).T}, ValueError, "inner stride 1"),
    "weight device": (EMBEDS | {"weight": torch.zeros(5, 3, device="meta")}, ValueError, "weight is on meta"),
    "ids dtype": (EMBEDS | {"ids": torch.zeros(2)}, TypeError, "int64 or int32"),
    "ids shape": (EMBEDS | {"ids": torch.tensor([0])}, ValueError, "ids must have shape"),
    "ids device": (EMBEDS | {"ids": torch.tensor([0, 1], device="meta")}, ValueError, "ids is on meta"),
    "embedded dtype": (EMBEDS | {"embedded": torch.zeros(2, 3).half()}, TypeError, "as weight is"),
    "embedded shape": (EMBEDS | {"embedded": torch.zeros(3, 3)}, ValueError, "embedded must have shape"),
    "embedded strides": (EMBEDS | {"embedded": torch.zeros(3, 2).T}, ValueError, r"embedded\.contiguous\(\)"),
    "embedded device": (EMBEDS | {"embedded": torch.zeros(2, 3, device="meta")}, ValueError, "embedded is on meta"),
    "delta of other positions": (EMBEDS | {"ids": torch.tensor([0]), "embedded": torch.zeros(1, 3)},
                                 ValueError, "without slot"),
    "slot dtype": (EMBEDS | {"slot": SLOT.int()}, TypeError, "int64"),
    "slot shape": (EMBEDS | {"slot": torch.tensor([0])}, ValueError, "slot must have shape"),
    "slot device": (EMBEDS | {"slot": SLOT.to("meta")}, ValueError, "slot is on meta"),
    "slot and delta": (EMBEDS | {"slot": SLOT, "delta": torch.zeros(2, 1, 3), "grad": torch.ones(2, 1, 3)},
                       ValueError, r"\[R, D\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str) -> None:
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        ascend(**arguments)
    assert (FIT["delta"] == 0).all() and (EMBEDS["embedded"] == 0).all()
    assert FIT["delta"]._version == EMBEDS["embedded"]._version == 0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Hypothesis draws the call's form and shrinks it; the numbers come from a seed, which is ten times faster."""
    dtypes, form = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(["plain", "position", "slot"]))
    (direction, ball), bad = draw(st.sampled_from(RULES)), draw(st.booleans())
    leading = draw(st.lists(st.integers(0, 5), min_size=1, max_size=1 if form == "slot" else 3))
    shape = (*leading, draw(st.integers(1, 70)))
    seed = draw(st.integers(0, 2**31))
    torch.default_generator.manual_seed(seed)
    chance = random.Random(seed)
    low, high = {F32: (-44, 37), F64: (-320, 305), BF16: (-40, 37), F16: (-7, 4)}[dtypes[1]]
    delta, grad = values(shape, dtypes, 10.0 ** chance.randint(low, high))
    delta *= chance.choice([0.0, 1.0, 1.0, 1.0, 1e-5, 1e-30, 1e5, 1e30])
    grad *= torch.rand(shape) < chance.choice([0.0, 0.1, 1.0, 1.0])
    if bad and grad.numel():
        grad.view(-1)[chance.randrange(grad.numel())] = chance.choice([math.nan, math.inf, 0.0, -0.0])
    embedding = None
    if form != "plain":
        ids = torch.randint(7, (6,) if form == "slot" else shape[:-1])
        slot = torch.randint(-1, shape[0], ids.shape) if form == "slot" else None
        weight = torch.randn(7, shape[-1]).to(chance.choice([F64] if dtypes[0] == F64 else [F32, BF16, F16]))
        embedding = (weight, ids, slot)
    return Case(
        delta,
        grad,
        hidden(shape) if chance.random() < 0.5 else None,
        embedding,
        step_size=chance.choice([0.3, 0.0, -0.3, 1e-6, 1e4]),
        epsilon=chance.choice([0.5, 0.0, 1e-4, 100.0, None]),
        direction=direction,
        ball=ball,
        group=chance.randint(0, len(leading)),
    )


@settings(max_examples=200)
@given(cases())
def test_agrees_on_anything(case: Case) -> None:
    case.agrees()


@pytest.mark.slow
@settings(max_examples=10_000)
@given(cases())
def test_agrees_on_very_much(case: Case) -> None:
    case.agrees()
