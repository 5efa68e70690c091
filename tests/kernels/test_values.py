"""What the kernels compute: interpreted with `--backend triton`, or on the GPU where there is one.

tests/ops and tests/methods are run with that option as well; here is what only kernels have: groups of many tiles, long
segments, rows that lie apart, buffers between guard rows, and indices out of range.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv import kernels
from fastadv.arguments.kinds import KINDS
from fastadv.arguments.lookup import Lookup
from fastadv.arguments.moments import Moments, planes
from fastadv.arguments.rule import BALLS, DIRECTIONS, MOMENT_BALLS, MOMENT_DIRECTIONS, Rule
from fastadv.native.flags import check
from fastadv.ops import segments
from fastadv.ops.ascend import eager as eager_ascend
from fastadv.ops.divergence import eager as plain_divergence
from fastadv.ops.gather_perturb import eager as plain_gather
from fastadv.ops.gather_perturb import eager_backward as plain_backward
from fastadv.ops.moment_step import eager as eager_moment_step
from fastadv.ops.segment_sum import eager as plain_sum
from fastadv.ops.table_step import eager as eager_table_step
from tests.flat import ascends, table_steps

if not (kernels.interpreted() or torch.cuda.is_available()):
    pytest.skip("neither interpreted (--backend triton) nor on a GPU", allow_module_level=True)

from fastadv.kernels.ascend import ascend as kernel_ascend
from fastadv.kernels.divergence import divergence
from fastadv.kernels.gather_perturb import gather_perturb, gather_perturb_backward
from fastadv.kernels.moment_step import moment_step as kernel_moment_step
from fastadv.kernels.segment_sum import segment_sum
from fastadv.kernels.table_step import table_step as kernel_table_step

ascend, plain_ascend = ascends(kernel_ascend), ascends(eager_ascend)
table_step, plain_table_step = table_steps(kernel_table_step), table_steps(eager_table_step)
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
RULES = [pair for pair in itertools.product(DIRECTIONS, BALLS) if pair[1] != "none"]
GUARD = 77.0


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def randn(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).to(DEVICE)


def counter() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device=DEVICE)


def guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `values` [N, ...] between rows that nobody may touch, and those rows."""
    room = values.new_full((len(values) + 4, *values.shape[1:]), GUARD)
    room[2:-2] = values
    return room[2:-2], room


def untouched(room: Tensor) -> bool:
    return bool((room[:2] == GUARD).all() and (room[-2:] == GUARD).all())


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = (got.double().cpu() - want.double().cpu()).norm()
    assert error <= TOLERANCE[dtype] * max(1.0, float(want.double().norm())), float(error)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_ascend_of_groups_of_many_tiles(direction: str, ball: str, dtype: torch.dtype) -> None:
    """Two samples of 12 x 130, which is a tile and a bit, and all of it as one; with words to look up."""
    ids = torch.randint(9, (2, 12), device=DEVICE)
    weight, mask = randn(9, 130, dtype=dtype), torch.rand(2, 12, device=DEVICE) < 0.8
    grad = torch.where(mask.unsqueeze(-1), randn(2, 12, 130, dtype=dtype), math.nan)
    for group in (0, 1, 2):
        delta, room = guarded(randn(2, 12, 130, dtype=wide(dtype), scale=0.1))
        embedded, words = guarded(torch.full_like(grad, math.nan))
        want, skipped = delta.clone(), counter()
        plain_ascend(want, grad, mask, skipped, 0.3, 0.5, direction, ball, group)
        ascend(delta, grad, mask, skipped, 0.3, 0.5, direction, ball, group, weight, ids, None, embedded)
        assert int(skipped) == 0
        close(delta, want, wide(dtype))
        assert torch.equal(embedded, (weight[ids].to(delta.dtype) + delta).to(dtype))
        assert untouched(room)
        assert untouched(words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("direction", "ball"), RULES)
def test_ascend_of_runs(direction: str, ball: str, dtype: torch.dtype) -> None:
    """Of many tiles, of a row, of none; with room for more runs than there are; with words to look up."""
    ids, weight = torch.randint(9, (2, 7), device=DEVICE), randn(9, 130, dtype=dtype)
    mask = torch.rand(2, 7, device=DEVICE) < 0.8
    grad = torch.where(mask.unsqueeze(-1), randn(2, 7, 130, dtype=dtype), math.nan)
    for runs in ([0, 1, 10, 10, 14], [0, 14, 14]):
        starts = torch.tensor(runs, device=DEVICE)
        delta, room = guarded(randn(2, 7, 130, dtype=wide(dtype), scale=0.1))
        embedded, words = guarded(torch.full_like(grad, math.nan))
        want, skipped, plain = delta.clone(), counter(), counter()
        plain_ascend(want, grad, mask, plain, 0.3, 0.5, direction, ball, 1, starts=starts)
        ascend(delta, grad, mask, skipped, 0.3, 0.5, direction, ball, 1, weight, ids, None, embedded, starts)
        assert int(skipped) == int(plain) == 0
        close(delta, want, wide(dtype))
        assert torch.equal(embedded, (weight[ids].to(delta.dtype) + delta).to(dtype))
        assert untouched(room)
        assert untouched(words)
        bad = grad.clone()
        bad[0, 0, 0], bad[1, 6, 129] = math.inf, math.nan
        ascend(delta, bad, None, skipped, 0.3, 0.5, direction, ball, 1, starts=starts)
        plain_ascend(want, bad, None, plain, 0.3, 0.5, direction, ball, 1, starts=starts)
        assert int(skipped) == int(plain) > 0
        close(delta, want, wide(dtype))


BY_MOMENTS = [
    *((*rule, torch.float32) for rule in itertools.product(MOMENT_DIRECTIONS, MOMENT_BALLS)),
    *(("adamw", "l2", dtype) for dtype in DTYPES[1:]),
]


@pytest.mark.parametrize(("direction", "ball", "dtype"), BY_MOMENTS, ids=str)
def test_moment_step(direction: str, ball: str, dtype: torch.dtype) -> None:
    """Groups of many tiles, of a row, and runs; between guards, with words to look up; one group that is not finite."""
    ids, weight = torch.randint(9, (2, 12), device=DEVICE), randn(9, 130, dtype=dtype)
    mask = torch.rand(2, 12, device=DEVICE) < 0.8
    mask[1, 3] = True
    grad = torch.where(mask.unsqueeze(-1), randn(2, 12, 130, dtype=dtype), math.nan)
    grad[1, 3, 7] = math.inf
    start = randn(2, 12, 130, dtype=wide(dtype), scale=0.1)
    kept = randn(planes(direction), 2, 12, 130, dtype=wide(dtype), scale=0.1).abs()
    for group, starts in ((0, None), (1, None), (2, None), (1, torch.tensor([0, 1, 10, 10, 24], device=DEVICE))):
        rule = Rule(0.05, 0.3, direction, ball, group)
        found = []
        for run in (kernel_moment_step, eager_moment_step):
            delta, room = guarded(start)
            moments, planes_room = guarded(kept)
            embedded, words = guarded(torch.full_like(grad, math.nan))
            skipped, lookup = counter(), Lookup(weight, ids, None, embedded)
            run(delta, grad, mask, skipped, moments, rule, Moments.of(rule, 3), lookup, starts)
            assert torch.equal(embedded, (weight[ids].to(delta.dtype) + delta).to(dtype))
            assert untouched(room)
            assert untouched(planes_room)
            assert untouched(words)
            found.append((delta, moments, int(skipped)))
        close(found[0][0], found[1][0], wide(dtype))
        close(found[0][1], found[1][1], wide(dtype))
        assert found[0][2] == found[1][2] == 1
    slot = torch.randint(-1, 5, (2, 12), device=DEVICE)
    delta, moments, embedded = randn(5, 130, dtype=wide(dtype)), kept[:, 0, :5].contiguous(), torch.empty_like(grad)
    run_on = (randn(5, 130, dtype=dtype), None, counter(), moments, rule, Moments.of(rule, 1))
    kernel_moment_step(delta, *run_on, Lookup(weight, ids, slot, embedded))
    assert torch.equal(embedded, plain_gather(weight, ids, delta, slot))


def test_moment_step_repeats_bit_for_bit_and_takes_rows_that_lie_apart() -> None:
    every, start = randn(6, 50, 130), randn(6, 25, 130, scale=0.1)
    for group, grad in itertools.product((0, 1, 2), (every[:, ::2], every[:, :1].expand(6, 25, 130))):
        rule, found = Rule(0.1, 0.2, "adam", "l2", group), []
        for given in (grad, grad, grad.contiguous()):
            delta, moments = start.clone(), torch.full((2, 6, 25, 130), 0.01, device=DEVICE)
            kernel_moment_step(delta, given, None, counter(), moments, rule, Moments.of(rule, 2))
            found.append(torch.stack([delta, *moments]))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_starts_that_point_outside_touch_nothing_else() -> None:
    for runs in ([0, 3, 99], [-7, 2, 6], [0], [4, 2, 6]):
        delta, room = guarded(randn(6, 130))
        ascend(delta, randn(6, 130), None, counter(), 0.3, 0.5, "l2", "l2", 1, starts=torch.tensor(runs, device=DEVICE))
        assert untouched(room)
        assert delta.isfinite().all()


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("direction", ["l2", "max"])
def test_size_of_the_gradient_does_not_matter(direction: str, scale: float) -> None:
    unit, want = randn(3, 5, 33).clamp(-0.9, 0.9), torch.zeros(3, 5, 33, device=DEVICE)
    for group in (1, 2):
        delta, skipped = torch.zeros(3, 5, 33, device=DEVICE), counter()
        plain_ascend(want.zero_(), unit, None, skipped, 1.0, None, direction, "none", group)
        ascend(delta, unit * scale, None, skipped, 1.0, None, direction, "none", group)
        assert int(skipped) == 0
        assert torch.allclose(delta, want, atol=2e-6 if scale > 1e-38 else 2e-4)  # 1e-40 is denormal


@pytest.mark.parametrize("group", [0, 1, 2])
def test_a_step_back_onto_nothing_and_from_far_outside(group: int) -> None:
    """Where delta is nearly -a g / |g| the sum of squares cancels; where it is far outside, it must come back."""
    grad = randn(2, 9, 130)
    start = torch.zeros_like(grad)
    plain_ascend(start, -grad, None, counter(), 0.3, None, "l2", "none", group)
    delta = start.clone()
    ascend(delta, grad, None, counter(), 0.3, 0.5, "l2", "l2", group)
    assert delta.norm() < 1e-6
    delta = start * 1000
    ascend(delta, grad, None, counter(), 299.5, 0.1, "l2", "l2", group)
    norms = torch.linalg.vector_norm(delta.double(), dim={0: (0, 1, 2), 1: (1, 2), 2: (2,)}[group])
    assert norms.max() <= 0.1 * (1 + 1e-6)
    assert norms.min() >= 0.1 * (1 - 1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_groups_that_are_not_finite_are_counted_and_others_step(direction: str, bad: float) -> None:
    for group, count in ((1, 2), (2, 3)):
        delta, grad, skipped = torch.zeros(4, 3, 40, device=DEVICE), randn(4, 3, 40), counter()
        grad[1, 2, 39], grad[3, 0, 0], grad[3, 1, 5], grad[0] = bad, bad, bad, 0
        ascend(delta, grad, None, skipped, 0.1, 1.0, direction, "l2", group)
        want, plain = torch.zeros_like(delta), counter()
        plain_ascend(want, grad, None, plain, 0.1, 1.0, direction, "l2", group)
        assert int(skipped) == int(plain) == count
        close(delta, want, torch.float32)


def test_ascend_repeats_bit_for_bit_and_takes_rows_that_lie_apart() -> None:
    every = randn(6, 50, 130)
    for group, grad in itertools.product((0, 1, 2), (every[:, ::2], every[:, :1].expand(6, 25, 130))):
        delta = randn(6, 25, 130, scale=0.1)
        moved = []
        for given in (grad, grad, grad.contiguous()):
            moved.append(delta.clone())
            ascend(moved[-1], given, None, counter(), 0.1, 0.2, "l2", "l2", group)
        assert torch.equal(moved[0], moved[1])
        assert torch.equal(moved[0], moved[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_rows_of_several_tiles_that_lie_apart(kind: str, dtype: torch.dtype) -> None:
    spread, target = randn(4, 2700, dtype=dtype, scale=3), randn(4, 2500, dtype=dtype)
    logits, weights = spread[:, 100:2600], torch.tensor([1.0, 0.0, 0.25, 3.0], dtype=wide(dtype), device=DEVICE)
    spread[1] = math.nan
    got = divergence(logits, target, weights, kind, True, True)
    want = plain_divergence(logits.double(), target.double(), weights.double(), kind, True, True)
    for one, other, into in zip(got, want, (wide(dtype), dtype, dtype), strict=True):
        close(one, other, into)
    assert all(map(torch.equal, got, divergence(logits, target, weights, kind, True, True)))
    [values, nothing, right] = divergence(logits, target, weights, kind, False, True)
    assert nothing.numel() == 0
    assert torch.equal(values, got[0])
    assert torch.equal(right, got[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 33, 300])
def test_lookups_and_sums(dim: int, dtype: torch.dtype) -> None:
    """Words that occur a hundred times, words that do not, masked positions, and room for more words than there are."""
    ids = torch.cat([torch.full((100,), 3), torch.arange(1, 40), torch.full((7,), 5)]).to(DEVICE)
    ids = ids[torch.randperm(len(ids)).to(DEVICE)]
    mask = torch.rand(len(ids), device=DEVICE) < 0.9
    groups = segments(ids, 50, mask=mask, fused=False)
    grad = torch.where(mask.unsqueeze(1), randn(len(ids), dim, dtype=dtype), math.nan)
    sums = segment_sum(grad, groups.order, groups.starts, groups.stops)
    close(sums, plain_sum(grad.to(wide(dtype)), groups.order, groups.starts, groups.stops), wide(dtype))
    assert torch.equal(sums, segment_sum(grad, groups.order, groups.starts, groups.stops))

    weight, rows = randn(60, dim, dtype=dtype)[5:55], randn(len(groups.stops), dim, dtype=wide(dtype))
    for added, slot in ((None, None), (randn(len(ids), dim, dtype=wide(dtype)), None), (rows, groups.slot)):
        assert torch.equal(gather_perturb(weight, ids, added, slot), plain_gather(weight, ids, added, slot))

    clean = [randn(len(ids), dim, dtype=dtype), randn(1, dim, dtype=wide(dtype)).expand(len(ids), dim)]
    for grads in (clean[:1], clean, [*clean, clean[0], clean[1]]):
        (table, room), want = guarded(weight), weight.clone()
        gather_perturb_backward(table, grads, ids, groups.order, groups.starts, 5)
        plain_backward(want, grads, ids, groups.order, groups.starts, 5)
        close(table, want, dtype)
        assert torch.equal(table[5], weight[5])
        assert torch.equal(table[40:], weight[40:])
        assert untouched(room)


def test_bits_are_kept_where_nothing_is_added() -> None:
    weight, slot = torch.tensor([[-0.0, 1.0]], device=DEVICE), torch.tensor([-1, 0], device=DEVICE)
    out = gather_perturb(weight, torch.zeros_like(slot), torch.zeros(1, 2, device=DEVICE), slot)
    assert out.signbit()[:, 0].tolist() == [True, False]


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_table_step(dtype: torch.dtype, group: int) -> None:
    ids = torch.randint(30, (4, 20), device=DEVICE)
    groups = segments(ids, 50, mask=torch.rand(4, 20, device=DEVICE) < 0.9, fused=False)
    weight, grad = randn(50, 130, dtype=dtype), randn(80, 130, dtype=dtype)
    rows = randn(len(groups.stops), 130, dtype=wide(dtype), scale=0.01)
    found = []
    for run in (table_step, plain_table_step):
        (delta, room), (out, words) = guarded(rows), guarded(torch.full((4, 20, 130), math.nan).to(weight))
        skipped = counter()
        arguments: Any = (delta, grad, skipped, 0.3, 0.5, "l2", "l2", group, *groups)
        run(*arguments, weight, ids, out, torch.empty_like(delta))
        assert int(skipped) == 0
        assert untouched(room)
        assert untouched(words)
        found.append((delta, out))
    close(found[0][0], found[1][0], wide(dtype))
    close(found[0][1], found[1][1], dtype)
    used = groups.slot >= 0
    added = torch.where(used.view(4, 20, 1), found[0][0][groups.slot.view(4, 20)], 0)
    assert torch.equal(found[0][1], (weight[ids].to(added.dtype) + added).to(dtype))


def test_indices_out_of_range_are_left_out_and_told_once() -> None:
    weight = torch.ones(5, 3, device=DEVICE)
    ids, slot = torch.tensor([0, 99, -1, 4], device=DEVICE), torch.tensor([0, 0, 0, 1], device=DEVICE)
    assert gather_perturb(weight, ids, None, None)[:, 0].tolist() == [1, 0, 0, 1]
    told()
    out = gather_perturb(weight, ids.clamp(0, 4), torch.ones(1, 3, device=DEVICE), slot)
    assert out[:, 0].tolist() == [2, 2, 2, 1]
    told()
    plan = (torch.tensor([0, 7, 1], device=DEVICE), torch.tensor([0, 2, 9], device=DEVICE))
    sums = segment_sum(torch.ones(3, 2, device=DEVICE), *plan, torch.tensor([2, 3, 11], device=DEVICE))
    assert sums[:, 0].tolist() == [1, 1, 0]
    told()
    table, starts = torch.zeros(4, 2, device=DEVICE), torch.tensor([0, 1, 2], device=DEVICE)
    words = torch.tensor([4, 1], device=DEVICE)
    gather_perturb_backward(table, [torch.ones(2, 2, device=DEVICE)], words, torch.arange(2, device=DEVICE), starts, -1)
    assert table.flatten().tolist() == [0, 0, 1, 1, 0, 0, 0, 0]
    told()


def told() -> None:
    with pytest.raises(IndexError, match="out of range"):
        check(DEVICE)
    check(DEVICE)


def test_empty() -> None:
    weight, none = torch.ones(5, 3, device=DEVICE), torch.zeros(2, 0, dtype=torch.int64, device=DEVICE)
    assert gather_perturb(weight, none, None, None).shape == (2, 0, 3)
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        delta = torch.zeros(shape, device=DEVICE)
        for group in (0, 1, 2):
            ascend(delta, delta, None, counter(), 1.0, 1.0, "l2", "l2", group)
            rule, moments = Rule(1.0, 1.0, "adam", "l2", group), delta.new_zeros(2, *shape)
            kernel_moment_step(delta, delta.clone(), None, counter(), moments, rule, Moments.of(rule, 1))
    groups = segments(none.flatten(), 5, fused=False)
    assert segment_sum(torch.ones(0, 3, device=DEVICE), *groups[1:]).shape == (0, 3)
