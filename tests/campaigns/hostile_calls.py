"""Calls with arguments that nobody should pass, in children of their own: an exception or a result, and never a signal.

The targets are the functions of the extension, called as the launchers call them, the launchers, and the public ops
above them. Each call breaks one to three of its arguments.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastadv import native, ops
from fastadv.native.launch import compiled
from fastadv.ops.grads import ACCUMULATE, COPY, Plan
from tests.campaigns.fuzz_ops import misaligned
from tests.csrc.test_launch import BROKEN, GOOD, GROUPS, IDS, RULE

BATCH, SECONDS = 50, 120
NO_TENSOR = (None, 3, "table", [1.0], object(), np.zeros(3), torch.float32, torch.device("cpu"), type)
NUMBERS = (None, -1, 0, 1, 3, 2**31, 2**63 - 1, -(2**63), 2**70, 0.5, float("nan"), float("inf"), "x", [], (), object())
Random = np.random.Generator


def fake(tensor: Tensor) -> Tensor:
    with FakeTensorMode():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)


def freed(tensor: Tensor) -> Tensor:
    """Without its memory: whatever torch reads of it ends the process."""
    tensor.untyped_storage().resize_(0)
    return tensor


def is_freed(value: Any) -> bool:
    return type(value) is Tensor and value.layout is torch.strided and value.untyped_storage().nbytes() == 0


WAYS: dict[str, Callable[[Tensor], Any]] = {
    **BROKEN,
    "fake": fake,
    "freed": freed,
    "misaligned": misaligned,
    "requires a gradient": lambda tensor: tensor.requires_grad_(),
    "inference": lambda tensor: _inference(tensor),
    "nothing": lambda tensor: tensor.new_empty(0).as_strided((0,) * tensor.dim(), (0,) * tensor.dim()),
    "wide": lambda tensor: tensor.flatten()[:1].expand(2**40),
    "negative": lambda tensor: -tensor - 1,
    "huge": lambda tensor: tensor + 2**62,
    "least": lambda tensor: torch.full_like(tensor, -(2**63)),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor]),
}


def _inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def over(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor like the first, in memory that is the other's."""
    room = torch.zeros(max(tensor.numel() * tensor.element_size(), other.numel() * other.element_size()) + 8)
    room = room.view(torch.uint8)[: 8 * (room.numel() * 4 // 8)]
    other.set_(room.view(other.dtype).untyped_storage(), 0, other.shape, other.contiguous().stride())  # type: ignore[call-overload]
    return room.view(tensor.dtype).flatten()[: tensor.numel()].view(tensor.shape)


class Target:
    """What is called, with arguments that are good."""

    def __init__(self, name: str, call: Callable[..., Any], arguments: Callable[[], dict[str, Any]]) -> None:
        self.name, self.call, self.arguments = name, call, arguments


def _exported(function: str, name: str) -> Target:
    launch, good, numbers = GOOD[name]

    def call(signature: Any, count: Any, **given: Any) -> Any:
        tensors = tuple(given.pop(f"t{i}") for i in range(count))
        return getattr(native.extension(), function)(signature, tensors, *given.values())

    def arguments() -> dict[str, Any]:
        tensors = {f"t{i}": tensor.clone() for i, tensor in enumerate(good)}
        numbered = {f"n{i}": number for i, number in enumerate((*numbers, 1))}
        return {"signature": compiled(launch.signature), "count": len(good), **tensors, **numbered}

    return Target(f"_C.{function}", call, arguments)


def _launcher(name: str) -> Target:
    launch, good, numbers = GOOD[name]

    def call(**given: Any) -> Any:
        tensors = tuple(given.pop(f"t{i}") for i in range(len(good)))
        return launch(tensors, *given.values())

    def arguments() -> dict[str, Any]:
        tensors = {f"t{i}": tensor.clone() for i, tensor in enumerate(good)}
        return {**tensors, **{f"n{i}": number for i, number in enumerate(numbers)}}

    return Target(f"launcher {name}", call, arguments)


def _groups(call: Callable[..., Any]) -> Callable[..., Any]:
    """With the four tensors of the plan as arguments of their own."""

    def run(slot: Any, order: Any, starts: Any, stops: Any, **given: Any) -> Any:
        return call(groups=ops.Segments(slot, order, starts, stops), **given)

    return run


def _plan(into: Any, source: Any, number: Any) -> None:
    plan = Plan([torch.zeros(3), into], [torch.ones(3), source])
    plan.accumulate(number)
    if into is not None and not isinstance(into, int):
        into.data = torch.zeros(1)
    plan.accumulate(number)


def targets() -> list[Target]:
    step = {"skipped": torch.zeros((), dtype=torch.int64), **RULE._asdict()}
    plan, table = dict(zip(GROUPS._fields, GROUPS, strict=True)), torch.ones(5, 6)
    embedded, position = torch.zeros(2, 4, 6), torch.ones(8, 6)
    pair = {"into": torch.zeros(4), "source": torch.ones(4)}
    functions: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "ops.ascend": (ops.ascend, {"delta": embedded + 1, "grad": embedded + 2, "mask": embedded[..., 0] == 0,
                                    "weight": table, "ids": IDS, "embedded": embedded, **step}),
        "ops.moment_step": (ops.moment_step, {
            "delta": embedded + 1, "grad": embedded + 2, "mask": embedded[..., 0] == 0, "weight": table, "ids": IDS,
            "embedded": embedded, "moments": torch.zeros(2, 2, 4, 6), "count": 1, **step, "direction": "adam"}),
        "ops.table_step": (_groups(ops.table_step), {
            "delta": torch.ones(4, 6), "grad": position, "weight": table, "ids": IDS, "embedded": embedded,
            "room": torch.ones(4, 6), **plan, **step}),
        "ops.gather_perturb": (ops.gather_perturb, {
            "weight": table, "ids": IDS, "leaf": embedded, "added": torch.ones(4, 6), "slot": GROUPS.slot.view(2, 4)}),
        "ops.gather_perturb_backward": (
            _groups(lambda table, grad, **given: ops.gather_perturb_backward(table, [position, grad], **given)),
            {"table": table, "grad": position, "ids": IDS, **plan, "padding_idx": 0}),
        "ops.segments": (ops.segments, {"ids": IDS, "vocabulary": 5, "mask": IDS > 1}),
        "ops.segment_sum": (_groups(ops.segment_sum), {"values": position, **plan}),
        "ops.divergence": (ops.divergence, {"logits": table, "target": table + 1, "weights": table[:, 0],
                                            "kind": "kl"}),
        "ops.rows.touched": (ops.rows.touched, {"table": table}),
        "ops.rows.back_up": (ops.rows.back_up, {"table": table, "rows": torch.tensor([1, 3])}),
        "ops.rows.restore": (ops.rows.restore, {
            "table": table, "saved": torch.ones(2, 6), "rows": torch.tensor([1, 3])}),
        "ops.rows.step": (ops.rows.step, {
            "table": table, "grad": table + 1, "saved": torch.ones(2, 6), "rows": torch.tensor([1, 3]), **step}),
        "ops.grads copy": (lambda into, source: COPY.choose("cpu", True)([into], [source]), pair),
        "ops.grads accumulate": (
            lambda into, source, weight: ACCUMULATE.choose("cpu", True)([into], [source], weight),
            {**pair, "weight": 0.5}),
        "ops.grads.Plan": (_plan, {**pair, "number": 0.5}),
        "_C.grads_cpu": (
            lambda signature, into, source, **given: native.extension().grads_cpu(
                signature, [into], [source], *given.values()),
            {"signature": compiled(ops.grads.native_grads.GRADS_PAIR), **pair, "kind": 1, "number": 0.5, "threads": 1}),
        "_C.Signature": (
            lambda op, dtype, of, kind, symbol, layout: native.extension().Signature(
                op, [(dtype, of, [(kind, symbol)], layout, False, True)], False).takes((torch.ones(3),)),
            {"op": "ascend", "dtype": 0, "of": 0, "kind": 0, "symbol": 3, "layout": 0}),
        "_C.same_members": (
            lambda fields, kinds, known: native.extension().same_members(fields, kinds, known),
            {"fields": [{"a": {"b": table}}], "kinds": ("a",), "known": [table]}),
        "_C.connect": (
            lambda cls, dtypes, exchange: native.extension().connect(cls, dtypes, exchange),
            {"cls": torch.Tensor, "dtypes": [torch.float32] * 7, "exchange": True}),
    }  # fmt: skip

    def of(given: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        return lambda: {name: one.clone() if isinstance(one, Tensor) else one for name, one in given.items()}

    public = [Target(name, call, of(given)) for name, (call, given) in functions.items()]
    exported = [_exported(launch._function, name) for name, (launch, _, _) in GOOD.items()]
    return public + exported + [_launcher(name) for name in GOOD]


def broken(rng: Random, value: Any, others: list[Tensor]) -> Any:
    """Something else in place of an argument."""
    if isinstance(value, Tensor):
        kind = rng.integers(12)
        if kind == 0:
            return NO_TENSOR[rng.integers(len(NO_TENSOR))]
        other = others[rng.integers(len(others))]
        if kind < 3 and other is not value and type(other) is Tensor:
            return over(value, other)
        return WAYS[list(WAYS)[rng.integers(len(WAYS))]](value)
    if isinstance(value, tuple) and value:
        parts = list(value)
        parts[rng.integers(len(parts))] = NUMBERS[rng.integers(len(NUMBERS))]
        return tuple(parts) if rng.random() < 0.8 else tuple(parts[:-1])
    if type(value).__name__ == "Signature" and rng.random() < 0.8:
        return compiled(list(GOOD.values())[rng.integers(len(GOOD))][0].signature)
    return (*NUMBERS, *NO_TENSOR)[rng.integers(len(NUMBERS) + len(NO_TENSOR))]


def attempt(rng: Random, called: list[Target]) -> str:
    """One call; what came of it."""
    target = called[rng.integers(len(called))]
    given = target.arguments()
    for _ in range(1 + int(rng.integers(3))):
        name = list(given)[rng.integers(len(given))]
        tensors = [one for one in given.values() if isinstance(one, Tensor)] or [torch.zeros(3)]
        if is_freed(given[name]):
            continue
        with contextlib.suppress(Exception):  # torch has no such tensor
            given[name] = broken(rng, given[name], tensors)
    try:
        target.call(**given)
    except Exception as error:  # noqa: BLE001 - any exception is an answer
        return type(error).__name__
    return "answered"


def described(case: list[int], called: list[Target]) -> str:
    rng = np.random.default_rng(case)
    return f"{called[rng.integers(len(called))].name}, seed {case}"


def run(cases: list[list[int]], called: list[Target], write: int) -> None:
    """In the child: a line for each call that came back."""
    signal.alarm(SECONDS)
    faulthandler.disable()
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1), os.dup2(devnull, 2)
    for case in cases:
        found = attempt(np.random.default_rng(case), called)
        with contextlib.suppress(Exception):
            native.extension().connect(torch.Tensor, list(native.DTYPES), True)
        os.write(write, f"{found}\n".encode())
    os._exit(0)


def batch(cases: list[list[int]], called: list[Target]) -> tuple[list[str], int]:
    """What came of the calls of one child, as far as it came, and the signal that ended it, or 0."""
    sys.stdout.flush()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            run(cases, called, write)
        finally:
            os._exit(77)
    os.close(write)
    with os.fdopen(read) as lines:
        found = lines.read().split()
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return found, os.WTERMSIG(status)
    return found, os.WEXITSTATUS(status) and -os.WEXITSTATUS(status)


def _batches(cases: list[list[int]], called: list[Target]) -> Iterator[tuple[list[str], int, list[int] | None]]:
    while cases:
        found, end = batch(cases[:BATCH], called)
        done = min(len(found) + bool(end), len(cases))
        yield found, end, cases[done - 1] if end else None
        cases = cases[done:]


def hostile_calls(count: int, seed: int) -> dict[str, Any]:
    """Make so many calls: `cases`, what came of them by kind, and `wrong`, by signal, those that ended the process."""
    called = targets()
    with contextlib.suppress(Exception):  # what torch loads at the first such tensor, every child would load again
        ops.divergence(fake(torch.zeros(1, 2)), torch.zeros(1, 2))
    outcomes: Counter[str] = Counter()
    wrong: Counter[str] = Counter()
    details = []
    for found, end, case in _batches([[seed, number] for number in range(count)], called):
        outcomes.update(found)
        if case is not None:
            name = signal.Signals(end).name if end > 0 else f"exit {-end}"
            wrong[name] += 1
            details.append(f"{name}: {described(case, called)}")
    return {"cases": count, "wrong": dict(wrong), "outcomes": dict(outcomes), "details": details}
