"""The step of a table in one call is its three ops in three calls, bit for bit, and refuses what they refuse."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastadv import native
from fastadv.arguments.rule import BALLS, DIRECTIONS
from fastadv.native.ascend import ascend as native_ascend
from fastadv.native.segment_sum import segment_sum, segments
from fastadv.native.table_step import table_step as native_table_step
from fastadv.ops.table_step import eager as eager_table_step
from tests.csrc.test_ascend import edges, guarded
from tests.flat import ascends, table_steps

pytestmark = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")

ascend, table_step, eager = ascends(native_ascend), table_steps(native_table_step), table_steps(eager_table_step)
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = [(F32, F32), (F64, F64), (F32, BF16), (F32, F16), (BF16, F32), (BF16, BF16), (F16, F16)]  # weight and gradient
RULES = list(itertools.product(DIRECTIONS, BALLS))
IDS = {
    "repeats": torch.tensor([[3, 1, 3, 0], [1, 1, 6, 3]]),
    "one word": torch.full((2, 9), 5),
    "all different": torch.arange(7).flip(0),
    "one position": torch.tensor([4]),
    "none": torch.empty(0, 3, dtype=torch.int64),
    "int32": torch.tensor([6, 0, 6], dtype=torch.int32),
}
Plan = tuple[Tensor, Tensor, Tensor, Tensor]  # slot, order, starts, stops


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Case(NamedTuple):
    """One call."""

    weight: Tensor
    ids: Tensor
    plan: Plan
    delta: Tensor
    grad: Tensor
    rule: dict[str, Any]

    def together(self) -> tuple[Tensor, Tensor, int]:
        """In one call, between guards."""
        skipped = torch.zeros((), dtype=torch.int64)
        delta, grad, room = guarded(self.delta), guarded(self.grad), guarded(torch.zeros_like(self.delta))
        out = guarded(self.weight.new_zeros(*self.ids.shape, self.weight.shape[1]))
        self.run(table_step, delta[0], grad[0], skipped, out[0], room[0])
        for guard in (delta, grad, room, out):
            assert edges(guard[1]).isnan().all()
        return delta[0], out[0], int(skipped)

    def run(self, step: Any, delta: Tensor, grad: Tensor, skipped: Tensor, out: Tensor, room: Tensor) -> None:
        lookup = {"weight": self.weight, "ids": self.ids, "embedded": out, "room": room}
        names = ("slot", "order", "starts", "stops")
        step(delta, grad, skipped, **self.rule, **dict(zip(names, self.plan, strict=True)), **lookup)

    def apart(self) -> tuple[Tensor, Tensor, int]:
        """In three."""
        delta, skipped = self.delta.clone(), torch.zeros((), dtype=torch.int64)
        slot, order, starts, stops = self.plan
        g = segment_sum(self.grad, order, starts, stops)
        out = self.weight.new_empty(*self.ids.shape, self.weight.shape[1])
        lookup = {"weight": self.weight, "ids": self.ids, "slot": slot.view(self.ids.shape), "embedded": out}
        ascend(delta, g, None, skipped, **self.rule, **lookup)
        return delta, out, int(skipped)

    def agrees(self) -> None:
        for got, want in zip(self.together()[:2], self.apart()[:2], strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            whole = want.dtype.itemsize  # as integers: bits, and NaNs of the same kind
            kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[whole]
            assert torch.equal(got.view(kind), want.view(kind)), self.rule
        assert self.together()[2] == self.apart()[2]


def case(ids: Tensor, dim: int, dtypes: Any, *, mask: bool = False, spare: bool = False, **rule: Any) -> Case:
    """Random numbers; `spare`: the plan has room that no id takes."""
    weight = torch.randn(7, dim, dtype=F64).to(dtypes[0])
    live = torch.rand(ids.numel()) < 0.6 if mask else None
    slot, order, starts, stops = segments(ids.flatten(), live, 7)
    rows = len(stops) if spare else len(ids.unique())
    plan = (slot, order, starts[: rows + 1], stops[:rows])
    wide = F64 if dtypes[0] == F64 else F32
    delta = 0.1 * torch.randn(rows, dim, dtype=F64).to(wide)
    grad = torch.randn(ids.numel(), dim, dtype=F64).to(dtypes[1])
    rule = {"step_size": 0.3, "epsilon": 0.5, "direction": "l2", "ball": "l2", "group": 0} | rule
    return Case(weight, ids, plan, delta, grad, rule)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_is_its_three_ops(direction: str, ball: str, name: str, dtypes: Any) -> None:
    for dim, group, mask, spare in itertools.product((1, 15, 33), (0, 1), (False, True), (False, True)):
        for epsilon in (0.2, 50.0, None):
            rule = {"direction": direction, "ball": ball, "group": group, "epsilon": epsilon}
            case(IDS[name], dim, dtypes, mask=mask, spare=spare, **rule).agrees()


@pytest.mark.parametrize("dim", [0, 512, 1000])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_wide_rows_and_empty_ones(dtypes: Any, dim: int) -> None:
    for group, mask in itertools.product((0, 1), (False, True)):
        case(IDS["repeats"], dim, dtypes, mask=mask, group=group).agrees()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_agrees_with_eager(dtypes: Any) -> None:
    for mask, group in itertools.product((False, True), (0, 1)):
        one = case(IDS["repeats"], 33, dtypes, mask=mask, group=group)
        delta, out, skipped = one.delta.clone(), torch.empty(*one.ids.shape, 33, dtype=dtypes[0]), torch.tensor(0)
        one.run(eager, delta, one.grad, skipped, out, torch.empty_like(delta))
        got, embedded, count = one.together()
        torch.testing.assert_close(got, delta, rtol=1e-5 if delta.dtype == F32 else 1e-13, atol=1e-6)
        torch.testing.assert_close(embedded, out, rtol=2 * torch.finfo(out.dtype).eps, atol=1e-6)
        assert count == int(skipped) == 0


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_threads_change_nothing(dtypes: Any) -> None:
    ids = torch.randint(300, (8, 97)).clamp(max=6)  # most positions are one word's
    many = case(ids, 770, dtypes, mask=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(many.together())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0])
        assert torch.equal(other[1], found[0][1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("group", [0, 1])
def test_what_is_not_finite_moves_nothing(group: int, bad: float) -> None:
    one = case(IDS["repeats"], 5, (F32, F32), group=group)
    one.grad[2, 3] = bad  # word 3
    one.agrees()
    delta, _, skipped = one.together()
    assert skipped == 1
    still = delta == one.delta
    assert still.all() if group == 0 else (still.all(1) == torch.tensor([False, False, True, False])).all()


def test_what_is_masked_does_not_leak() -> None:
    one = case(IDS["one word"], 5, (F32, F32))
    mask = torch.arange(18) % 3 > 0
    one = one._replace(plan=segments(one.ids.flatten(), mask, 7))
    one = one._replace(plan=(one.plan[0], one.plan[1], one.plan[2][:2], one.plan[3][:1]))
    one.grad[~mask] = math.nan
    one.agrees()
    _, out, skipped = one.together()
    assert skipped == 0
    assert torch.equal(out.view(18, 5)[0], one.weight[5])


def test_strided_and_expanded_rows() -> None:
    one = case(IDS["repeats"], 33, (F32, F32))
    wide, weight = torch.randn(8, 70), torch.randn(7, 50)
    for grad in (wide[:, 2:35], torch.randn(1, 33).expand(8, 33), torch.randn(33).expand(8, 33)):
        other = one._replace(grad=grad, weight=weight[:, 9:42])
        delta, skipped, room = one.delta.clone(), torch.tensor(0), torch.empty_like(one.delta)
        out = torch.empty(2, 4, 33)
        other.run(table_step, delta, grad, skipped, out, room)
        want = other.apart()
        assert torch.equal(delta, want[0])
        assert torch.equal(out, want[1])


@pytest.mark.parametrize("rows", [0, 3])
def test_rows_without_positions_and_positions_without_rows(rows: int) -> None:
    """Room for words is projected without any; positions that are masked are looked up without a row."""
    delta, skipped, starts = torch.ones(rows, 5), torch.tensor(0), torch.zeros(rows + 1, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int64)
    plan = dict(zip(("slot", "order", "starts", "stops"), (none, none, starts, starts[1:].clone()), strict=True))
    room, rule = torch.empty(rows, 5), GOOD.rule
    lookup = {"weight": GOOD.weight, "ids": none, "embedded": torch.empty(0, 5), "room": room}
    table_step(delta, torch.empty(0, 5), skipped, **rule, **plan, **lookup)
    assert rows == 0 or abs(float(delta.norm()) - 0.5) < 1e-6
    if rows == 0:
        ids, out = torch.tensor([4, 2]), torch.empty(2, 5)
        plan |= {"slot": torch.full((2,), -1), "order": torch.arange(2)}
        lookup |= {"ids": ids, "embedded": out}
        table_step(delta, torch.ones(2, 5), skipped, **rule, **plan, **lookup)
        assert torch.equal(out, GOOD.weight[ids])
        with pytest.raises(IndexError, match="slot"):
            table_step(delta, torch.ones(2, 5), skipped, **rule, **(plan | {"slot": torch.tensor([-1, 0])}), **lookup)


def test_versions_of_what_is_mutated() -> None:
    one = case(IDS["repeats"], 5, (F32, F32))
    delta, skipped, out, room = one.delta.clone(), torch.tensor(0), torch.empty(2, 4, 5), torch.empty_like(one.delta)
    before = [tensor._version for tensor in (delta, skipped, out, room, one.grad, one.weight, one.ids)]
    one.run(table_step, delta, one.grad, skipped, out, room)
    after = [tensor._version for tensor in (delta, skipped, out, room, one.grad, one.weight, one.ids)]
    assert [new - old for new, old in zip(after, before, strict=True)] == [1, 1, 1, 1, 0, 0, 0]


def changed(tensor: Tensor, index: int, value: int) -> Tensor:
    copy = tensor.clone()
    copy.view(-1)[index] = value
    return copy


GOOD = case(IDS["repeats"], 5, (F32, F32))
SLOT, ORDER, STARTS, STOPS = GOOD.plan
BAD_INDICES = {
    "id below": {"ids": changed(GOOD.ids, 1, -1)},
    "id above": {"ids": changed(GOOD.ids, 1, 7)},
    "slot below": {"slot": changed(SLOT, 0, -2)},
    "slot above": {"slot": changed(SLOT, 0, 4)},
    "order below": {"order": changed(ORDER, 3, -1)},
    "order above": {"order": changed(ORDER, 3, 8)},
    "starts below": {"starts": changed(STARTS, 0, -1)},
    "stops above": {"stops": changed(STOPS, 3, 9)},
    "stops before starts": {"stops": changed(STOPS, 2, 1)},
    "words that overlap": {"stops": changed(STOPS, 0, 3)},
    "starts out of order": {"starts": changed(STARTS, 1, 7), "stops": changed(STOPS, 1, 7)},
    "a slot of another word": {"slot": changed(SLOT, 0, 1)},
    "a first position of another word": {"order": ORDER.flip(0)},
    "other ids": {"ids": GOOD.ids.flip(1)},
    "a slot of a word without positions": {"stops": changed(STOPS, 1, int(STARTS[1]))},
}


@pytest.mark.parametrize("name", BAD_INDICES)
def test_indices_that_do_not_fit_change_nothing(name: str) -> None:
    delta, skipped, out, room = GOOD.delta.clone(), torch.tensor(0), torch.zeros(2, 4, 5), torch.zeros_like(GOOD.delta)
    plan = dict(zip(("slot", "order", "starts", "stops"), GOOD.plan, strict=True))
    arguments = {**plan, "weight": GOOD.weight, "ids": GOOD.ids, "embedded": out, "room": room, **BAD_INDICES[name]}
    with pytest.raises(IndexError, match="table_step: "):
        table_step(delta, GOOD.grad, skipped, **GOOD.rule, **arguments)
    assert torch.equal(delta, GOOD.delta)
    assert not out.any()
    assert not room.any()


def test_a_gradient_of_columns() -> None:
    columns = GOOD._replace(grad=GOOD.grad.t().contiguous().t())
    skipped, out, room = torch.tensor(0), torch.zeros(2, 4, 5), torch.zeros_like(GOOD.delta)
    delta = GOOD.delta.clone()
    columns.run(table_step, delta, columns.grad, skipped, out, room)
    assert torch.equal(delta, GOOD.together()[0])


REFUSED = {
    "a delta of halves": ({"delta": GOOD.delta.half()}, TypeError),
    "a gradient in float64": ({"grad": GOOD.grad.double()}, TypeError),
    "integers for a gradient": ({"grad": GOOD.grad.long()}, TypeError),
    "a gradient for fewer positions": ({"grad": GOOD.grad[1:]}, ValueError),
    "room of another shape": ({"room": GOOD.delta[1:].clone()}, ValueError),
    "room of halves": ({"room": GOOD.delta.half()}, TypeError),
    "room with gaps": ({"room": torch.zeros(4, 10)[:, ::2]}, ValueError),
    "an order of int32": ({"order": ORDER.int()}, TypeError),
    "too few starts": ({"starts": STARTS[1:]}, ValueError),
    "too many stops": ({"stops": torch.cat([STOPS, STOPS])}, ValueError),
    "slots of int32": ({"slot": SLOT.int()}, TypeError),
    "too few slots": ({"slot": SLOT[1:]}, ValueError),
    "ids of floats": ({"ids": GOOD.ids.float()}, TypeError),
    "a narrower table": ({"weight": GOOD.weight[:, 1:]}, ValueError),
    "a table in float64": ({"weight": GOOD.weight.double()}, TypeError),
    "a result of another shape": ({"embedded": torch.zeros(8, 5)}, ValueError),
    "a result of another dtype": ({"embedded": torch.zeros(2, 4, 5, dtype=BF16)}, TypeError),
    "an unknown direction": ({"direction": "up"}, ValueError),
    "an unknown ball": ({"ball": "cube"}, ValueError),
    "a group of elements": ({"group": 2}, ValueError),
    "a count of floats": ({"skipped": torch.tensor(0.0)}, TypeError),
    "no memory": ({"delta": GOOD.delta.to("meta")}, RuntimeError),
    "a table on another device": ({"weight": GOOD.weight.to("meta")}, ValueError),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str) -> None:
    change, error = REFUSED[name]
    plan = dict(zip(("slot", "order", "starts", "stops"), GOOD.plan, strict=True))
    delta, out = GOOD.delta.clone(), torch.zeros(2, 4, 5)
    arguments = {"delta": delta, "grad": GOOD.grad, "skipped": torch.tensor(0), **GOOD.rule, **plan}
    arguments |= {"weight": GOOD.weight, "ids": GOOD.ids, "embedded": out, "room": torch.empty_like(delta)}
    with pytest.raises(error, match="table_step: "):
        table_step(**{**arguments, **change})
    assert torch.equal(delta, GOOD.delta)
    assert not out.any()


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    """Hypothesis draws the call's form; the numbers come from a seed."""
    ids = draw(st.lists(st.integers(0, 6), max_size=12))
    dim, dtypes = draw(st.integers(0, 40)), draw(st.sampled_from(DTYPES))
    direction, ball = draw(st.sampled_from(RULES))
    torch.default_generator.manual_seed(seed := draw(st.integers(0, 2**31)))
    chance = random.Random(seed)
    one = case(
        torch.tensor(ids, dtype=chance.choice([torch.int64, torch.int32])),
        dim,
        dtypes,
        mask=chance.random() < 0.5,
        spare=chance.random() < 0.5,
        direction=direction,
        ball=ball,
        group=chance.randint(0, 1),
        epsilon=chance.choice([0.5, 0.0, 1e-4, 100.0, None]),
        step_size=chance.choice([0.3, 0.0, -0.3, 1e4]),
    )
    if one.grad.numel() and chance.random() < 0.3:
        one.grad.view(-1)[chance.randrange(one.grad.numel())] = chance.choice([math.nan, math.inf, 0.0, -0.0, 1e30])
    return one._replace(delta=one.delta * chance.choice([0.0, 1.0, 1e-30, 1e5]))


@settings(max_examples=200)
@given(drawn())
def test_agrees_on_anything(case: Case) -> None:
    case.agrees()


@pytest.mark.slow
@settings(max_examples=10_000)
@given(drawn())
def test_agrees_on_very_much(case: Case) -> None:
    case.agrees()
