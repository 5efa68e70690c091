"""Signals wait where they could leave something half done, and come everywhere else."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from fastadv.engine.safety.interrupts import Block, Interrupts, insist, whole


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def strike(times: int = 1, number: int = signal.SIGINT) -> None:
    for _ in range(times):
        signal.raise_signal(number)


@whole
def careful(done: list[str], times: int = 1) -> None:
    done.append("begun")
    strike(times)
    done.append("ended")


@pytest.mark.parametrize("times", [1, 5])
def test_a_signal_waits_for_the_end_of_what_is_whole(times: int) -> None:
    held, done = Interrupts(), list[str]()
    held.hold()
    careful(done, times)
    assert done == ["begun", "ended"]
    with pytest.raises(KeyboardInterrupt):
        held.release()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_comes_at_once_anywhere_else() -> None:
    held = Interrupts()
    held.hold()
    with pytest.raises(KeyboardInterrupt):
        strike()
    held.release()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_unheld_nothing_waits() -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        careful(done)
    assert done == ["begun"]


def test_a_handler_of_the_users_own_is_called_for_each_kind() -> None:
    seen: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: seen.append(number))
    held = Interrupts()
    held.hold()

    @whole
    def both() -> None:
        strike(3, signal.SIGTERM)
        strike()
        assert not seen

    both()
    held.release()
    assert sorted(seen) == [signal.SIGINT, signal.SIGTERM]


def test_one_that_raises_does_not_swallow_the_others() -> None:
    seen: list[int] = []

    def leave(number: int, frame: Any) -> None:
        seen.append(number)
        raise SystemExit

    signal.signal(signal.SIGTERM, leave)
    held = Interrupts()
    held.hold()
    whole_both = whole(lambda: (strike(), strike(number=signal.SIGTERM)))
    whole_both()
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        held.release()
    assert seen == [signal.SIGTERM]
    assert {type(caught.value), type(caught.value.__context__)} == {KeyboardInterrupt, SystemExit}


def test_held_twice_as_in_a_step_within_a_step() -> None:
    outer, inner, done = Interrupts(), Interrupts(), list[str]()
    outer.hold()
    inner.hold()
    careful(done)
    with pytest.raises(KeyboardInterrupt):  # the outer one's closure runs the inner one: it may be interrupted
        inner.release()
    careful(done)
    assert done == ["begun", "ended"] * 2
    with pytest.raises(KeyboardInterrupt):
        outer.release()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_was_set_meanwhile_stays() -> None:
    held = Interrupts()
    held.hold()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    held.release()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_leaves_handlers_alone() -> None:
    seen: list[Any] = []

    def hold() -> None:
        Interrupts().hold()
        seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


def test_insist_acts_twice() -> None:
    left = [ValueError("first")]

    def once() -> None:
        if left:
            raise left.pop()

    assert str(insist([once])) == "first" and not left
    left += [ValueError("second"), ValueError("first")]
    acted: list[str] = []
    assert str(insist([once, lambda: acted.append("after")])) == "second"
    assert acted == ["after"] and insist([once]) is None


class Moves:
    """Something that is put back, and is struck on the way."""

    def __init__(self, strikes: int = 0) -> None:
        self.at, self.strikes = 0, strikes

    def move(self) -> None:
        self.at = 1

    def put_back(self) -> None:
        if self.strikes:
            self.strikes -= 1
            raise KeyboardInterrupt
        strike()  # a real one, which waits
        self.at = 0


@pytest.mark.parametrize("strikes", [0, 1])
def test_a_block_puts_back_whatever_happens(strikes: int) -> None:
    moves = Moves(strikes)
    with pytest.raises(KeyboardInterrupt), Block(moves.move, moves.put_back):  # noqa: PT012 - of the block, which ends
        assert moves.at == 1
        strike()
    assert moves.at == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_block_that_cannot_begin() -> None:
    moves = Moves()

    def fails() -> None:
        moves.move()
        raise ValueError("no room")

    with pytest.raises((ValueError, KeyboardInterrupt)), Block(fails, moves.put_back):
        pytest.fail("it has not begun")
    assert moves.at == 0


def test_a_block_that_was_never_left_puts_back_when_it_is_dropped() -> None:
    moves = Moves()
    block = Block(moves.move, lambda: setattr(moves, "at", 0))
    block.__enter__()
    assert moves.at == 1
    del block
    assert moves.at == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
