"""fastadv's ops, each against plain PyTorch: who takes part, and the bytes that have to move."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import vector_norm

from bench.attack_steps import prepare_rows
from bench.contest import Field
from bench.race import Entry, Run, nothing
from bench.workloads import LENGTH, RADIUS, Workload, gradient
from fastadv import ops

RULE: dict[str, Any] = {"step_size": LENGTH, "epsilon": RADIUS, "direction": "l2", "ball": "l2"}
RATE = 1e-3  # of a step by moments: further than the ball reaches
DIMS = {"batch": (0, 1, 2), "sample": (1, 2), "token": (2,)}


# Formulas, and what inductor makes of them


def _lookup(weight: Tensor, ids: Tensor, delta: Tensor) -> Tensor:
    return F.embedding(ids, weight) + delta


def _scatter(into: Tensor, inverse: Tensor, grad: Tensor) -> Tensor:
    return torch.zeros_like(into).index_add(0, inverse, grad)


def _moved(delta: Tensor, grad: Tensor, dims: tuple[int, ...]) -> Tensor:
    moved = delta + LENGTH * grad / vector_norm(grad, dim=dims, keepdim=True)
    return moved * (RADIUS / vector_norm(moved, dim=dims, keepdim=True)).clamp(max=1)


def _stepped(kept: Tensor, grad: Tensor, saved: Tensor) -> Tensor:
    r = kept + LENGTH * grad / vector_norm(grad) - saved
    return saved + r * (RADIUS / vector_norm(r)).clamp(max=1)


def _by_adamw(
    delta: Tensor, grad: Tensor, m: Tensor, v: Tensor, dims: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """The first step of AdamW, by torch's defaults, and then the ball."""
    m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad.square()
    moved = (1 - 0.01 * RATE) * delta + RATE / 0.1 * m / ((v / 0.001).sqrt() + 1e-8)
    return moved * (RADIUS / vector_norm(moved, dim=dims, keepdim=True)).clamp(max=1), m, v


_compiled_lookup, _compiled_scatter, _compiled, _compiled_step, _compiled_adamw = (
    torch.compile(formula, dynamic=False) for formula in (_lookup, _scatter, _moved, _stepped, _by_adamw)
)


def gather(work: Workload) -> Field:
    """W[ids] + delta. `reference`: a lookup, and a sum; `torch`: the sum in place."""
    weight, ids, delta = work.weight, work.ids, work.start
    out = torch.empty_like(work.grad)

    def in_place() -> Tensor:
        torch.index_select(weight, 0, ids.flatten(), out=out.view(-1, out.shape[-1]))
        return out.add_(delta)

    runs = {
        "reference": lambda: _lookup(weight, ids, delta),
        "torch": in_place,
        "compiled": lambda: _compiled_lookup(weight, ids, delta),
        "fused": lambda: ops.gather_perturb(weight, ids, delta, added=delta),
    }
    return work.field((4 + work.word) * work.positions + work.word * work.words, runs, tolerance=1e-6)


def backward(work: Workload, *, fresh: bool = False) -> Field:
    """The table's gradient on touched rows. `fresh`: as a step has it, in pages that the system has yet to give.

    `reference`: autograd's dense gradient, accumulated; `torch`: a bag's sums, added to the rows that there are.
    """
    into, ids, rows = [torch.zeros_like(work.weight)], work.ids.flatten(), prepare_rows(work.ids)

    def dense() -> None:
        into[0].add_(torch.ops.aten.embedding_dense_backward(work.flat, ids, len(into[0]), -1, False))

    def touched() -> None:
        into[0].index_add_(0, rows.unique, F.embedding_bag(rows.order, work.flat, rows.starts, mode="sum"))

    def fused() -> None:
        ops.gather_perturb_backward(into[0], [work.flat], ids, work.groups)

    def reset() -> None:
        if not fresh:
            into[0].zero_()
            return
        pages = mmap.mmap(-1, work.weight.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        into[0] = torch.frombuffer(pages, dtype=work.weight.dtype).view_as(work.weight)

    runs = {"reference": dense, "torch": touched, "fused": fused}
    return work.field(work.word * (work.positions + 2 * work.words), runs, reset, lambda: into[0])


def ascend(work: Workload, scope: str, *, words: bool = False) -> Field:
    """A step onto the ball, and with `words` the next forward's lookup.

    `reference`: the formula; `torch`: in place, each step and ball a factor.
    """
    dims, delta, out = DIMS[scope], work.start.clone(), torch.empty_like(work.grad)
    lookup: dict[str, Any] = {"weight": work.weight, "ids": work.ids, "embedded": out} if words else {}

    def norm(x: Tensor) -> Tensor:
        return vector_norm(x, dim=dims, keepdim=True)

    def in_place() -> Tensor:
        delta.addcmul_(work.grad, LENGTH / norm(work.grad))
        return delta.mul_((RADIUS / norm(delta)).clamp_(max=1))

    def fused() -> Tensor:
        ops.ascend(delta, work.grad, skipped=work.skipped, group=list(DIMS).index(scope), **RULE, **lookup)
        return out if words else delta

    def looked_up(moved: Tensor) -> Tensor:
        return F.embedding(work.ids, work.weight).add_(moved) if words else moved

    runs = {
        "reference": lambda: looked_up(_moved(delta, work.grad, dims)),
        "torch": lambda: looked_up(in_place()),
        "compiled": lambda: looked_up(_compiled(delta, work.grad, dims)),
        "fused": fused,
    }
    reads = 1 if scope == "token" else work.passes
    moved = (reads * (work.word + 4) + 4) * work.positions
    return work.field(moved + words * work.word * (work.positions + work.words), runs, lambda: delta.copy_(work.start))


def moment_step(work: Workload, scope: str) -> Field:
    """AdamW on a perturbation, onto the ball, and the next forward's lookup.

    `reference`: the formula; `torch`: torch.optim's AdamW, fused, and the ball in place.
    """
    dims, delta, out = DIMS[scope], work.start.clone().requires_grad_(), torch.empty_like(work.grad)
    optimizer = torch.optim.AdamW([delta], lr=RATE, maximize=True, fused=True)
    step, moments = torch.zeros((), device=delta.device), torch.zeros(2, *delta.shape, device=delta.device)
    m, v = moments
    optimizer.state[delta] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
    rule = {**RULE, "step_size": RATE, "direction": "adamw", "group": list(DIMS).index(scope)}
    lookup = {"weight": work.weight, "ids": work.ids, "embedded": out}

    def reset() -> None:
        delta.data.copy_(work.start)
        for one in (step, moments):
            one.zero_()

    def by_formula(formula: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        moved, *after = formula(delta.detach(), work.grad, m, v, dims)
        for kept, now in zip((m, v), after, strict=True):
            kept.copy_(now)
        return F.embedding(work.ids, work.weight).add_(moved)

    def by_optimizer() -> Tensor:
        delta.grad = work.grad
        optimizer.step()
        moved = delta.detach()
        moved.mul_((RADIUS / vector_norm(moved, dim=dims, keepdim=True)).clamp_(max=1))
        return F.embedding(work.ids, work.weight).add_(moved)

    def fused() -> Tensor:
        ops.moment_step(delta, work.grad, skipped=work.skipped, moments=moments, count=1, **rule, **lookup)
        return out

    runs = {
        "reference": lambda: by_formula(_by_adamw),
        "torch": by_optimizer,
        "compiled": lambda: by_formula(_compiled_adamw),
        "fused": fused,
    }
    reads = 1 if scope == "token" else work.passes
    moved = (reads * (work.word + 12) + 12) * work.positions
    return work.field(moved + work.word * (work.positions + work.words), runs, reset)


def segments(work: Workload) -> Field:
    """Once per batch. `reference`: `unique`, which is all that `index_add_` needs; `torch`: what a bag needs."""
    ids, vocabulary = work.ids.flatten(), work.shape.vocabulary
    runs = {
        "reference": lambda: ids.unique(return_inverse=True)[1],
        "torch": lambda: prepare_rows(ids).inverse,
        "fused": lambda: ops.segments(ids, vocabulary).slot,
    }
    return work.field(5 * ids.nbytes, runs, tolerance=0.0)


def segment_sum(work: Workload) -> Field:
    """`reference`: `index_add_`; `torch`: a bag over sorted positions; what is compiled scatters as the first does."""
    rows = prepare_rows(work.ids)
    into = work.grad.new_zeros(work.distinct, work.shape.dimension)
    runs = {
        "reference": lambda: _scatter(into, rows.inverse, work.flat),
        "torch": lambda: F.embedding_bag(rows.order, work.flat, rows.starts, mode="sum"),
        "compiled": lambda: _compiled_scatter(into, rows.inverse, work.flat),
        "fused": lambda: ops.segment_sum(work.flat, work.groups)[: work.distinct],
    }
    return work.field(work.word * work.positions + 4 * work.words, runs)


def touched(work: Workload) -> Field:
    """Which rows of a table's gradient there are: the host has to know how many."""
    grad = torch.zeros_like(work.weight).index_add_(0, work.ids.flatten(), work.flat)
    runs = {"torch": lambda: grad.any(1).nonzero().flatten(), "fused": lambda: ops.rows.touched(grad)}
    field = work.field(grad.nbytes, runs, tolerance=0.0)
    return field._replace(entries={name: entry._replace(waits=True) for name, entry in field.entries.items()})


def rows(work: Workload, what: str, *, some: bool = False) -> Field:
    """A table of as many rows as the batch has positions, moved in place: all of it, or every third row.

    A copy is a copy: into a new tensor, or back. Of a step, `reference`: as the script has it; `torch`: in place.
    """
    before, grad = work.flat.clone(), work.grads[1].flatten(0, 1)
    kept, chosen = before.clone(), torch.arange(0, len(before), 3, device=work.device) if some else None
    part: Any = slice(None) if chosen is None else chosen
    saved = before[part].clone()
    rule = {**RULE, "skipped": work.skipped, "saved": saved, "rows": chosen}

    def put(values: Tensor) -> None:
        kept.copy_(values) if chosen is None else kept.index_copy_(0, chosen, values)

    def in_place() -> None:
        g, r = grad[part], kept[part]
        r.add_(g, alpha=LENGTH / float(vector_norm(g))).sub_(saved)
        r.mul_(min(1.0, RADIUS / float(vector_norm(r)))).add_(saved)
        if chosen is not None:
            put(r)

    def field(passes: int, runs: Mapping[str, Run], reset: Run = nothing) -> Field:
        return work.field(passes * saved.nbytes, runs, reset, lambda: kept[part])

    if what == "back_up":
        plain = kept.clone if chosen is None else lambda: kept.index_select(0, part)
        return field(2, {"torch": plain, "fused": lambda: ops.rows.back_up(kept, chosen)})
    if what == "restore":
        return field(2, {"torch": lambda: put(saved), "fused": lambda: ops.rows.restore(kept, saved, chosen)})
    runs = {
        "reference": lambda: _stepped(kept[part], grad[part], saved),
        "torch": in_place,
        "compiled": lambda: _compiled_step(kept[part], grad[part], saved),
        "fused": lambda: ops.rows.step(kept, grad, **rule),
    }
    return field(3 * work.passes + 1, runs, lambda: kept.copy_(before))


def grads(what: str, count: int, elements: int, device: str) -> Field:
    """The gradients of a whole model at once. `reference`: tensor by tensor; `torch`: its multi-tensor functions."""
    from fastadv.ops.grads import Plan

    start, came = (gradient(elements, device=device, seed=seed) for seed in (2, 3))
    into, sources = ([one.clone() for _ in range(count)] for one in (start, came))
    plan, half = Plan(into, sources), {"alpha": 0.5}
    one: Callable[[Tensor, Tensor], Tensor]
    one, every, ours = {
        "copy": (Tensor.copy_, lambda: torch._foreach_copy_(into, sources), plan.copy),
        "accumulate": (
            lambda to, of: to.add_(of, **half),
            lambda: torch._foreach_add_(into, sources, **half),
            lambda: plan.accumulate(0.5),
        ),
        "average": (
            lambda to, of: to.mul_(0.5).add_(of, **half),
            lambda: torch._foreach_lerp_(into, sources, 0.5),
            lambda: plan.average(0.5),
        ),
    }[what]

    def entry(run: Run) -> Entry:
        return Entry(lambda: [to.copy_(start) for to in into], run, lambda: (run(), into)[1])

    runs = {
        "reference": lambda: [one(*pair) for pair in zip(into, sources, strict=True)],
        "torch": every,
        "fused": ours,
    }
    entries = {name: entry(run) for name, run in runs.items()}
    moved = (2 if what == "copy" else 3) * 4 * count * elements  # read and written
    return Field(entries, moved, (count, elements), tolerance=1e-6)
