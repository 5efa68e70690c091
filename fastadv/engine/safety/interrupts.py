"""Signals whose handlers may raise (Ctrl-C) wait where an exception would leave a model half moved or half put back.

Python runs a handler between any two instructions of the main thread. While signals are held, a handler of this module
stands in for each: it looks where the program is. Inside a function marked `whole` the signal waits until the handlers
are given back; anywhere else it is handed on at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable
from types import CodeType, FrameType
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
NUMBERS = tuple(int(getattr(signal, name)) for name in NAMES if hasattr(signal, name))  # Windows has two of them

# The functions in C, without the enumerations that cost ten times as much as the call.
_get: Callable[[int], Any] = getattr(signal.getsignal, "__wrapped__", signal.getsignal)
_set: Callable[[int, Any], Any] = getattr(signal.signal, "__wrapped__", signal.signal)

TWICE = (1, 2)

_whole: set[CodeType] = set()


def whole(function: Function) -> Function:
    """Mark a function that runs to its end: signals that are held wait, in all that it calls too."""
    _whole.add(function.__code__)
    return function


class Interrupts:
    """Holds the signals of the main thread; elsewhere Python runs no handler, and there is nothing to do."""

    def __init__(self) -> None:
        self._stand_in = self._arrived
        self._handlers: dict[int, Any] = {}  # those that it stands in for
        self._waiting: set[int] = set()  # of several of one kind, one waits

    @whole
    def hold(self) -> None:
        """Stand in for every handler that is written in Python, until `release`."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in NUMBERS:
            handler = _get(number)
            if callable(handler) and handler is not self._stand_in:
                self._handlers[number] = handler
                _set(number, self._stand_in)

    @whole
    def release(self) -> None:
        """Give the handlers back, then hand on what waited.

        Raises:
            Whatever they raise.
        """
        for number, handler in self._handlers.items():
            if _get(number) is self._stand_in:  # somebody inside may have set another, to stay
                _set(number, handler)
        self.hand_on()

    @whole
    def hand_on(self) -> None:
        """Call the handlers of what waited.

        Raises:
            Whatever they raise.
        """
        waiting, self._waiting = self._waiting, set()
        self._hand_on(waiting, _outside(sys._getframe()))

    def _hand_on(self, waiting: set[int], frame: FrameType | None) -> None:
        if waiting:
            number = waiting.pop()
            try:
                self._handlers[number](number, frame)
            finally:
                self._hand_on(waiting, frame)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if _is_whole(frame):
            self._waiting.add(number)
        else:
            self._handlers[number](number, frame)


def _is_whole(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _whole:
            return True
        frame = frame.f_back
    return False


def _outside(frame: FrameType | None) -> FrameType | None:
    """Find who called what is whole."""
    while frame is not None and frame.f_code in _whole:
        frame = frame.f_back
    return frame


def insist(actions: Iterable[Callable[[], None]]) -> BaseException | None:
    """Act, each once more if something strikes meanwhile. Returns what struck last, to be raised when all is done."""
    struck: BaseException | None = None
    for action in actions:
        for _ in TWICE:
            try:
                action()
                break
            except BaseException as error:  # noqa: BLE001 - it is not lost
                struck = error
    return struck


class Block:
    """A `with` block before which something moves, and after which it is put back, whatever happened inside.

    Args:
        move: is called first. Where it fails, `put_back` follows.
        put_back: may be called several times.
    """

    def __init__(self, move: Callable[[], None], put_back: Callable[[], None]) -> None:
        self._move, self._put_back = move, put_back
        self._interrupts = Interrupts()
        self._inside = False

    @whole
    def __enter__(self) -> None:
        self._interrupts.hold()
        self._inside = True
        try:
            self._move()
        except BaseException:
            self._leave()
            raise

    @whole
    def __exit__(self, *_: object) -> None:
        try:
            self._leave()
        except BaseException:
            self._leave()  # it may not have begun
            raise

    @whole
    def _leave(self) -> None:
        grad = torch.is_grad_enabled()  # what is struck in a function under no_grad may leave it off
        ways = (self._put_back, lambda: torch._C._set_grad_enabled(grad), self._interrupts.release)
        struck = insist(ways)
        self._inside = False
        if struck is not None:
            raise struck

    def __del__(self) -> None:
        if self._inside:  # something struck on the way to `__exit__`
            self._leave()
