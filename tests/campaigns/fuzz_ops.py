"""The ops against numpy: random shapes, dtypes, strides, masks and numbers, those that are no numbers among them.

What is summed in a stated order is compared bit for bit; what is normalised, with a bound that follows from the size of
what goes in. Every case has a seed of its own, `[seed, op, number]`: `wrong` lists those that failed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastadv import ops
from fastadv.arguments.moments import planes
from fastadv.arguments.rule import MOMENT_BALLS, MOMENT_DIRECTIONS
from fastadv.ops.grads import Plan
from tests.campaigns import fuzz_oracles as oracle

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALES = (1.0, 1.0, 1.0, 1e-3, 1e3, 1e-20, 1e20, 1e-30, 1e30, 1e-40, 3e-44)
Random = np.random.Generator


def numbers(rng: Random, shape: tuple[int, ...], dtype: torch.dtype, *, odd: float = 0.0) -> Tensor:
    """Of one magnitude, mostly; some zeros, and by chance `odd` a NaN or an infinity."""
    scale = rng.choice(SCALES) if dtype in DTYPES[:2] else rng.choice(SCALES[:5])
    values = rng.standard_normal(shape) * scale
    if rng.random() < 0.2:
        values = values * (rng.random(shape) < 0.5)
    if values.size and rng.random() < odd:
        values.flat[rng.integers(values.size)] = rng.choice([math.nan, math.inf, -math.inf])
    return torch.from_numpy(np.asarray(values)).to(dtype)


BESIDE, TRANSPOSED, ODD = range(3)


def laid_out(rng: Random, tensor: Tensor, ways: tuple[int, ...] = (BESIDE, TRANSPOSED, ODD)) -> Tensor:
    """The same numbers: beside others, transposed in memory, or at an odd address."""
    how = rng.integers(6)
    if how not in ways:
        return tensor
    if how == BESIDE and tensor.dim() > 0:
        return torch.cat([tensor, tensor], dim=-1).narrow(-1, 0, tensor.shape[-1])
    if how == TRANSPOSED and tensor.dim() > 1:
        return tensor.mT.contiguous().mT
    if how == ODD and tensor.numel():
        return misaligned(tensor)
    return tensor


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers one byte behind a multiple of their size."""
    raw = bytearray(1) + bytearray(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(raw, dtype=tensor.dtype, offset=1).view(tensor.shape)


def plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % tensor.element_size() == 0


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def same(got: Tensor, want: Tensor) -> bool:
    return (
        got.dtype == want.dtype
        and got.shape == want.shape
        and bool(torch.equal(got.nan_to_num(7e3), want.nan_to_num(7e3)))
    )


def size(rng: Random, most: int = 5) -> int:
    return int(rng.integers(0, most + 1))


def table_and_ids(rng: Random, dtype: torch.dtype, odd: float = 0.1) -> tuple[Tensor, Tensor]:
    rows, count = 1 + size(rng, 6), size(rng, 9)
    ids = torch.from_numpy(rng.integers(0, rows, count))
    return numbers(rng, (rows, int(rng.choice([0, 1, 3, 8, 33]))), dtype, odd=odd), ids


def rule_of(rng: Random, groups: int) -> dict[str, Any]:
    return {
        "step_size": float(rng.choice([0.0, 0.3, 1.0, 1e-3, 50.0])),
        "epsilon": None if rng.random() < 0.15 else float(rng.choice([0.5, 1.0, 1e-2, 20.0])),
        "direction": str(rng.choice(["l2", "sign", "max"])),
        "ball": str(rng.choice(["l2", "linf", "unit", "none"])),
        "group": int(rng.integers(0, groups)),
    }


def ascend(rng: Random) -> bool:
    dtype = DTYPES[rng.integers(4)]
    shape = (size(rng, 3), size(rng, 4), int(rng.choice([0, 1, 5, 17])))
    rule, grad = rule_of(rng, 3), numbers(rng, shape, dtype, odd=0.15)
    delta = (rng.choice([0.0, 0.1, 1.0]) * torch.from_numpy(rng.standard_normal(shape))).to(wide(dtype))
    mask = None if rng.random() < 0.5 else torch.from_numpy(rng.random(shape[:2]) < 0.7)
    skipped, before = torch.zeros((), dtype=torch.int64), delta.clone()
    given = delta if rng.random() < 0.8 or not delta.numel() else misaligned(delta)
    starts = None if rng.random() < 0.5 else runs(rng, shape[0] * shape[1])
    ops.ascend(given, laid_out(rng, grad), mask=mask, skipped=skipped, starts=starts, **rule)
    return oracle.ascended(before, grad, mask, rule, given, int(skipped), starts)


def moment_step(rng: Random) -> bool:
    """Some steps of a search, of which each begins where the last has ended."""
    dtype = DTYPES[rng.integers(4)]
    shape = (size(rng, 3), size(rng, 4), int(rng.choice([0, 1, 5, 17])))
    rule = rule_of(rng, 3) | {"direction": str(rng.choice(MOMENT_DIRECTIONS)), "ball": str(rng.choice(MOMENT_BALLS))}
    delta = (rng.choice([0.0, 0.1, 1.0]) * torch.from_numpy(rng.standard_normal(shape))).to(wide(dtype))
    moments = torch.zeros(planes(rule["direction"]), *shape, dtype=delta.dtype)
    mask = None if rng.random() < 0.5 else torch.from_numpy(rng.random(shape[:2]) < 0.7)
    starts = None if rng.random() < 0.5 else runs(rng, shape[0] * shape[1])
    given = delta if rng.random() < 0.8 or not delta.numel() else misaligned(delta)
    for count in range(1, 4):
        grad, skipped = numbers(rng, shape, dtype, odd=0.15), torch.zeros((), dtype=torch.int64)
        before, kept = given.clone(), moments.clone()
        ops.moment_step(
            given, laid_out(rng, grad), mask=mask, skipped=skipped, moments=moments, starts=starts, count=count, **rule
        )
        if not oracle.moved_by_moments(before, grad, mask, rule, given, int(skipped), starts, (kept, moments), count):
            return False
    return True


def runs(rng: Random, rows: int) -> Tensor:
    """Where some groups begin that so many rows are cut into, empty ones among them."""
    cuts = np.sort(rng.integers(0, rows + 1, size(rng, 4)))
    return torch.tensor([0, *cuts.tolist(), rows])


def gather_perturb(rng: Random) -> bool:
    dtype = DTYPES[rng.integers(4)]
    table, ids = table_and_ids(rng, dtype)
    slots = size(rng, 4)
    by_slot = rng.random() < 0.5
    shape = (slots if by_slot else len(ids), table.shape[1])
    added = numbers(rng, shape, wide(dtype), odd=0.1)
    slot = torch.from_numpy(rng.integers(-1, slots, len(ids))) if by_slot else None
    leaf = torch.zeros(len(ids), table.shape[1])
    index = ids.int() if rng.random() < 0.3 else ids
    got = ops.gather_perturb(
        laid_out(rng, table, (BESIDE, ODD)), index, leaf, added=laid_out(rng, added, (ODD,)), slot=slot
    )
    return same(got, oracle.embedded(table, ids, added, slot))


def segments(rng: Random) -> bool:
    count, vocabulary = size(rng, 12), int(rng.choice([1, 3, 2000, 2**40]))
    ids = torch.from_numpy(rng.integers(0, min(vocabulary, 7) if rng.random() < 0.7 else vocabulary, count))
    mask = None if rng.random() < 0.4 else torch.from_numpy(rng.random(count) < 0.6)
    got = ops.segments(laid_out(rng, ids), vocabulary, mask=mask)
    return all(map(same, got, oracle.segments(ids, mask, vocabulary)))


def segment_sum(rng: Random) -> bool:
    dtype = DTYPES[rng.integers(4)]
    table, ids = table_and_ids(rng, dtype)
    mask = None if rng.random() < 0.4 else torch.from_numpy(rng.random(len(ids)) < 0.6)
    values = numbers(rng, (len(ids), table.shape[1]), dtype, odd=0.2)
    groups = ops.segments(ids, table.shape[0], mask=mask)
    return same(ops.segment_sum(laid_out(rng, values), groups), oracle.segment_sum(values, groups))


def gather_perturb_backward(rng: Random) -> bool:
    dtype = DTYPES[rng.integers(4)]
    table, ids = table_and_ids(rng, dtype, odd=0.1)
    grads = [
        numbers(rng, (len(ids), table.shape[1]), dtype if rng.random() < 0.5 else wide(dtype), odd=0.1)
        for _ in range(1 + size(rng, 2))
    ]
    padding = None if rng.random() < 0.5 else int(rng.integers(0, table.shape[0]))
    groups = ops.segments(ids, table.shape[0])
    want = oracle.backward(table, grads, groups, ids, padding)
    given = table if rng.random() < 0.8 or not table.numel() else misaligned(table)
    ops.gather_perturb_backward(given, [laid_out(rng, grad) for grad in grads], ids, groups, padding_idx=padding)
    return same(given, want)


def table_step(rng: Random) -> bool:
    dtype = DTYPES[rng.integers(4)]
    table, ids = table_and_ids(rng, dtype, odd=0.0)
    if dtype in DTYPES[:2]:
        table = torch.from_numpy(rng.standard_normal(tuple(table.shape))).to(dtype)
    mask = None if rng.random() < 0.4 else torch.from_numpy(rng.random(len(ids)) < 0.6)
    groups = ops.segments(ids, table.shape[0], mask=mask).trimmed()
    rows, dim = groups.stops.shape[0], table.shape[1]
    grad, rule = numbers(rng, (len(ids), dim), dtype, odd=0.15), rule_of(rng, 2)
    delta = (rng.choice([0.0, 0.1, 1.0]) * torch.from_numpy(rng.standard_normal((rows, dim)))).to(wide(dtype))
    before, skipped = delta.clone(), torch.zeros((), dtype=torch.int64)
    room, embedded = torch.empty(rows, dim, dtype=delta.dtype), torch.empty(len(ids), dim, dtype=dtype)
    weight, given = laid_out(rng, table, (BESIDE, ODD)), laid_out(rng, grad)
    ops.table_step(delta, given, groups, skipped=skipped, weight=weight, ids=ids, embedded=embedded, room=room, **rule)
    moved = oracle.ascended(before, oracle.segment_sum(grad, groups), None, rule, delta, int(skipped))
    return moved and same(embedded, oracle.embedded(table, ids, delta, groups.slot))


def divergence(rng: Random) -> bool:
    dtype = DTYPES[rng.integers(4)]
    shape = (size(rng, 4), int(rng.choice([1, 2, 3, 9, 40])))
    spread = rng.choice([1.0, 10.0, 300.0, 1e-4])
    logits, target = (torch.from_numpy(rng.standard_normal(shape) * spread).to(dtype) for _ in range(2))
    if rng.random() < 0.3:
        target = (logits.double() + 1e-3 * torch.from_numpy(rng.standard_normal(shape))).to(dtype)
    if logits.numel() and rng.random() < 0.4:
        place = tuple(int(rng.integers(n)) for n in shape)
        for one in (logits, target)[int(rng.integers(3)) % 2 :]:
            one[place] = rng.choice([math.inf, -math.inf, math.nan])
        if rng.random() < 0.2:
            logits[place[0]] = -math.inf
    weights = torch.from_numpy(rng.choice([0.0, 0.25, 1.0], shape[0])).to(wide(dtype))
    kind = str(rng.choice(["symmetric_kl", "kl", "js", "mse"]))
    given = [laid_out(rng, one).detach().requires_grad_() for one in (logits, target)]
    value = ops.divergence(*given, kind, weights=weights)
    grads = torch.autograd.grad(value, given) if shape[0] else (torch.zeros(shape), torch.zeros(shape))
    return oracle.divergence(logits.detach(), target.detach(), weights, kind, value.detach(), grads)


def grads(rng: Random) -> bool:
    into, sources = [], []
    for _ in range(size(rng, 4)):
        shape, dtype = tuple(size(rng, 4) for _ in range(size(rng, 3))), DTYPES[rng.integers(4)]
        into.append(numbers(rng, shape, dtype, odd=0.1))
        sources.append(laid_out(rng, numbers(rng, shape, dtype, odd=0.1)))
    name, number = str(rng.choice(["copy", "accumulate", "average"])), float(rng.choice([0.25, 1.0, 0.3, 0.0]))
    want = [oracle.blended(name, number, one, other) for one, other in zip(into, sources, strict=True)]
    sizes = [
        float(torch.stack(pair).abs().nan_to_num(0).double().max()) if pair[0].numel() else 0.0
        for pair in zip(into, sources, strict=True)
    ]
    through_cpp = [all(map(plain, pair)) for pair in zip(into, sources, strict=True)]
    plan = Plan(into, sources)
    getattr(plan, name)(*([] if name == "copy" else [number]))
    # PyTorch, which takes the others, may fuse a multiplication and an addition.
    return all(
        same(got, one) or (not exact and oracle.close(got, one, size))
        for got, one, exact, size in zip(into, want, through_cpp, sizes, strict=True)
    )


def rows(rng: Random) -> bool:
    dtype = DTYPES[rng.integers(4)]
    shape = (size(rng, 6), int(rng.choice([0, 1, 5, 17])))
    table = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
    grad = numbers(rng, shape, dtype, odd=0.15)
    touched = ops.rows.touched(laid_out(rng, grad))
    if touched.tolist() != [n for n in range(shape[0]) if bool((grad[n] != 0).any())]:
        return False
    some = touched if rng.random() < 0.6 else None
    saved = ops.rows.back_up(laid_out(rng, table), some)
    rule, skipped, before = rule_of(rng, 2), torch.zeros((), dtype=torch.int64), table.clone()
    if shape[0] and rng.random() < 0.5:
        table += torch.from_numpy(0.1 * rng.standard_normal(shape)).to(dtype)
    start = table.clone()
    ops.rows.step(table, grad, saved=saved, rows=some, skipped=skipped, **rule)
    if not oracle.stepped(start, grad, saved, some, rule, table, int(skipped)):
        return False
    ops.rows.restore(table, saved, some)
    return same(table if some is None else table[some], before if some is None else before[some])


OPS: dict[str, Callable[[Random], bool]] = {
    f.__name__: f
    for f in (
        ascend, table_step, gather_perturb, gather_perturb_backward, segments, segment_sum, divergence, grads, rows,
        moment_step,
    )
}  # fmt: skip


def fuzz_ops(cases_per_op: int, seed: int) -> dict[str, Any]:
    """Run so many cases of each op: `cases` and `wrong` in all, and by op with the seeds of the wrong."""
    found: dict[str, Any] = {}
    for place, (name, case) in enumerate(OPS.items()):
        wrong = []
        for number in range(cases_per_op):
            try:
                right = case(np.random.default_rng([seed, place, number]))
            except Exception as error:  # noqa: BLE001 - an op that refuses what is good
                right = False
                wrong.append(([seed, place, number], repr(error)[:200]))
            else:
                if not right:
                    wrong.append(([seed, place, number], "another result"))
        found[name] = {"cases": cases_per_op, "wrong": len(wrong), "first": wrong[:5]}
    return {
        "cases": sum(one["cases"] for one in found.values()),
        "wrong": sum(one["wrong"] for one in found.values()),
        "ops": found,
    }
