"""Exceptions that come at a chosen place: the n-th torch operation, Python call or signal."""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.campaigns.pair import Struck

KINDS: tuple[Callable[[], BaseException], ...] = (
    lambda: RuntimeError("boom"),
    lambda: KeyboardInterrupt(),
    lambda: MemoryError("boom"),
    lambda: SystemExit(3),
    lambda: StopIteration("boom"),
    lambda: torch.OutOfMemoryError("out of memory, as it were"),
    lambda: GeneratorExit(),
    lambda: RecursionError("boom"),
)
NEVER = -1


class AtOperation:
    """The n-th operation that torch dispatches fails, in the forward or in the backward; then, perhaps, a later one.

    Args:
        at: which; NEVER: count alone.
        errors: what is raised: one, or two of which the second comes `later` operations after the first.
        done: whether the operation is done before it fails.
    """

    def __init__(self, at: int, errors: list[BaseException], *, done: bool = False, later: int = 1) -> None:
        self.at, self.errors, self.done, self.later = at, list(errors), done, later
        self.count = 0
        self.fired = 0

    def __call__(self, action: Callable[[], None]) -> Struck:
        try:
            with _Watch(self):
                action()
        except BaseException as error:  # noqa: BLE001 - that is what it is about
            return Struck(self.fired > 0, False, error)
        return Struck(self.fired > 0, True, None)

    def now(self) -> bool:
        here = self.count == self.at
        self.count += 1
        return here and bool(self.errors)

    def fail(self) -> None:
        self.fired += 1
        self.at = self.count - 1 + self.later
        raise self.errors.pop(0)


class _Watch(TorchDispatchMode):
    def __init__(self, fault: AtOperation) -> None:
        super().__init__()
        self.fault = fault

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now = self.fault.now()
        if now and not self.fault.done:
            self.fault.fail()
        result = func(*args, **(kwargs or {}))
        if now:
            self.fault.fail()
        return result


class AtCall:
    """An exception at the n-th entry of a Python function or return of a C function; then, perhaps, at a later entry.

    Args:
        at: which; NEVER: count alone.
        errors: what is raised, one or two. None in place of one: a SIGINT is, which whoever handles it may hold back.
        later: how many functions are entered between the first and the second.
    """

    def __init__(self, at: int, errors: list[BaseException | None], *, later: int = 1) -> None:
        self.at, self.errors, self.later = at, list(errors), later
        self.count = 0
        self.fired = 0

    def __call__(self, action: Callable[[], None]) -> Struck:
        try:
            sys.setprofile(self._profile)
            try:
                action()
            finally:
                sys.setprofile(None)
                sys.settrace(None)
        except BaseException as error:  # noqa: BLE001 - that is what it is about
            return Struck(self.fired > 0, False, error)
        return Struck(self.fired > 0, True, None)

    def _profile(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "c_return") or argument is sys.setprofile:
            return
        here = self.count == self.at
        self.count += 1
        if here:
            sys.setprofile(None)
            if len(self.errors) > 1:
                sys.settrace(self._trace)
            self._fail()

    def _trace(self, frame: FrameType, event: str, argument: Any) -> None:
        self.later -= 1
        if self.later <= 0:
            sys.settrace(None)
            self._fail()

    def _fail(self) -> None:
        self.fired += 1
        error = self.errors.pop(0)
        if error is not None:
            raise error
        signal.raise_signal(signal.SIGINT)


def drawn(chance: random.Random, count: int) -> list[BaseException]:
    return [chance.choice(KINDS)() for _ in range(count)]
