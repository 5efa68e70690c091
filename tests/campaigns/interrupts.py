"""Real SIGINTs, sent by another process at a random time of a step: one, or a storm of them."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from tests.campaigns.pair import Struck

KILLER = Path(__file__).with_name("killer.py")


class Interrupts:
    """Signals of the process beside, see `killer`, for an action to be struck by."""

    def __init__(self) -> None:
        self.arrived = 0
        command = [sys.executable, str(KILLER), str(os.getpid())]
        self._killer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._killer.stdin is not None and self._killer.stdout is not None
        self._to, self._answer = self._killer.stdin.fileno(), self._killer.stdout.fileno()
        self._before = signal.signal(signal.SIGINT, self._handle)

    def close(self) -> None:
        assert self._killer.stdin is not None
        with contextlib.suppress(OSError):
            self._killer.stdin.close()
        self._killer.wait(10)
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, stopped: FrameType | None) -> None:
        """As Ctrl-C does, inside of an action. What is around it is not under test."""
        self.arrived += 1
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code is Interrupts._inside.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    def strike(self, action: Callable[[], None], gap: float, count: int, spread: float) -> Struck:
        """Run the action while `count` signals come: the first after `gap` seconds, the others within `spread` each."""
        self.arrived, error = 0, None
        try:
            self._inside(action, f"{gap} {count} {spread}\n".encode())
        except BaseException as caught:  # noqa: BLE001 - that is what it is about
            error = caught
        self._sent()
        return Struck(self.arrived > 0, error is None, error)

    def _inside(self, action: Callable[[], None], order: bytes) -> None:
        os.write(self._to, order)
        action()

    def _sent(self) -> None:
        """Wait until all signals have been sent, and so have come."""
        if not select.select([self._answer], [], [], 60)[0]:
            raise TimeoutError("the process that sends signals does not answer")
        os.read(self._answer, 1)


@contextlib.contextmanager
def interrupts() -> Iterator[Interrupts]:
    found = Interrupts()
    try:
        yield found
    finally:
        found.close()


class AtRandom:
    """Signals at a time drawn from the length that a step has."""

    def __init__(self, source: Interrupts, chance: random.Random, seconds: float, count: int) -> None:
        self.source, self.chance, self.seconds, self.count = source, chance, seconds, count

    def __call__(self, action: Callable[[], None]) -> Struck:
        gap = self.chance.random() * 1.1 * self.seconds
        return self.source.strike(action, gap, self.count, self.seconds / 20)


def seconds(action: Callable[[], None]) -> float:
    """How long an action takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
