"""What is measured, row by row: ops at a size that no cache holds, attack steps, training steps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from bench import memory
from bench.cases import op_cases, pgd_cases
from bench.contest import Case, Field, answer, check
from bench.gpu.figures import APART
from bench.gpu.row import Row
from bench.race import Copy, Entry, Result, captured, interval, nothing, race
from bench.workloads import MAIN, SIZES
from fastadv.ops.dispatch import OPS, Backend

ATTACK = "attack step, table scope, "
AGAIN = "fused, again"  # the same once more: what differs is noise
FURTHEST = 1e-3  # of the values' root mean square: how far a value may be from its eager one, beside its rounding


def rows(device: str) -> dict[str, Row]:
    """All of them. First whether the ops are right at that size: there is no figure for a wrong answer."""
    large, usual = (SIZES["gpu"], SIZES["full"]) if device == "cuda" else (SIZES["rehearsal"], SIZES["tiny"])
    rounds, ops, attacks = 21 if device == "cuda" else 2, op_cases(large, device), op_cases(usual, device)
    found = {f"copy{APART}bandwidth": Row(partial(bandwidth, large.copy, device, rounds))}
    timed = partial(partial, copy=(large.copy, device), rounds=rounds)
    found |= {f"checked{APART}{name}": Row(partial(checked, name, case)) for name, case in ops.items()}
    for name in (f"{ATTACK}{model}" for model in MAIN):
        found[f"attack_step{APART}{name}"] = Row(timed(attack_step, attacks[name]), 100.0)
    for name, case in pgd_cases(large, device).items():
        found[f"training_step{APART}{name}"] = Row(timed(training_step, case), 100.0)
    return found | {f"ops{APART}{name}": Row(timed(op, case)) for name, case in ops.items()}


copy_of = lru_cache(maxsize=1)(Copy)


def bandwidth(elements: int, device: str, rounds: int) -> dict[str, Any]:
    copy = copy_of(elements, device)
    result = race({"copy": Entry(nothing, copy)}, rounds, copy)
    return {"gbps": round(result.bandwidth / 1e9, 1), **spread(result)}


def op(case: Case, copy: tuple[int, str], rounds: int) -> dict[str, Any]:
    """In bfloat16, against the copy of the same run."""
    field = case.make()
    result = race(both(field, ["fused"], captured), rounds, copy_of(*copy))
    return {**spread(result), **result.speed("fused", field.moved or 0)}


def attack_step(case: Case, copy: tuple[int, str], rounds: int) -> dict[str, Any]:
    """From dE to the next forward's E in float32, everyone as a graph that can be."""
    check(field := case.make())
    return spread(race(both(field, list(field.entries), captured), rounds, copy_of(*copy)))


def training_step(case: Case, copy: tuple[int, str], rounds: int) -> dict[str, Any]:
    """PGD-3 under bfloat16 autocast, host included."""
    check(field := case.make())
    result = race(both(field, list(field.entries)), min(rounds, 11), copy_of(*copy))
    found = result.microseconds
    beside = round((found["fused"] - found["passes alone"]) / found["fused"], 4)
    peaks = memory.peaks(field.entries, copy[1])
    in_mib = {name: round(peak / memory.MIB, 1) for name, peak in peaks.items()}
    return {**spread(result), "beside_the_passes": beside, "peak_mib": in_mib}


def both(field: Field, names: list[str], put: Callable[[Entry], Entry] = lambda entry: entry) -> dict[str, Entry]:
    """These contestants, and fastadv once more."""
    return {**{name: put(field.entries[name]) for name in names}, AGAIN: put(field.entries["fused"])}


def spread(result: Result) -> dict[str, Any]:
    """Medians in microseconds, and the 95 % interval of each."""
    within = {name: [round(1e6 * one, 2) for one in interval(times)] for name, times in result.seconds.items()}
    return {"us": result.microseconds, "interval_us": within}


def checked(name: str, case: Case) -> dict[str, Any]:
    """fastadv's answer, written over poison, against that of the eager ops; or of tensor by tensor."""
    with poisoned():
        field = case.make()
        found = [one.clone() for one in answer(field, field.entries["fused"])]
    if name.startswith("grads"):
        want = answer(field, field.entries["reference"])
    else:
        with eager():
            want = answer(field, field.entries["fused"])
    assert len(found) == len(want) > 0
    worst = max(excess(one, right) for one, right in zip(found, want, strict=True))
    assert worst <= 1, f"a value is {worst:.3g} times as far from the eager op's as it may be"
    return {"elements": sum(one.numel() for one in found), "worst": round(worst, 4)}


def excess(found: Tensor, want: Tensor) -> float:
    """The largest distance, as a share of what is allowed; infinity where there is no number."""
    assert found.shape == want.shape and found.dtype == want.dtype
    if not want.is_floating_point():
        return 0.0 if torch.equal(found, want) else math.inf
    size = float(want.double().square().mean().sqrt())
    allowed = want.float().abs().mul_(2 * torch.finfo(want.dtype).eps).add_(FURTHEST * size + 1e-30)
    worst = float((found.float() - want.float()).abs_().div_(allowed).max()) if want.numel() else 0.0
    return worst if math.isfinite(worst) else math.inf


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that is new holds NaN, or the largest integer: what is not written shows."""
    kept = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = kept


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Inside, every op is its eager version, whatever `fused` says."""
    kept = [op.backends for op in OPS]
    for one in OPS:
        one.backends = {name: Backend("eager", name, one.eager) for name in one.backends}
    try:
        yield
    finally:
        for one, backends in zip(OPS, kept, strict=True):
            one.backends = backends
