"""A subject that meets faults beside a twin that meets none: every trial ends with the two alike."""

from __future__ import annotations

import gc
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fastadv
from fastadv.engine.safety.interrupts import Block
from tests.campaigns.configurations import Configuration
from tests.campaigns.state import WEIGHT, State, differences, put_right
from tests.campaigns.subject import Subject, seed_all

PACKAGE = str(Path(fastadv.__file__).parent)
KINDS = ("wrong weights", "other traces", "stays busy", "differs")
BEFORE, AFTER, RETURNED, UNSTRUCK, WRONG = "as before", "as done", "after the step", "no fault", "wrong"
WINDOW = "when let go"  # the end of a block was struck before its first instruction: it ends when the error is let go


class Struck(NamedTuple):
    """How an action under fault ended."""

    fired: bool  # whether there was a fault
    returned: bool  # whether the action came to its end
    error: BaseException | None


class Violation(NamedTuple):
    kind: str
    what: str


class Verdict(NamedTuple):
    """Where a trial left the model, and what is wrong with that."""

    outcome: str
    violations: list[Violation]


Strike = Callable[[Callable[[], None]], Struck]


class Pair:
    """Both are made anew after a violation, which would spoil what comes then."""

    def __init__(self, configuration: Configuration, seed: int, make: Callable[..., Subject] = Subject) -> None:
        self.configuration = configuration
        self.make = make
        self.seed = seed
        self.chance = random.Random(seed)
        self._renew()

    def _renew(self) -> None:
        put_right()
        self.subject, self.twin = (self.make(self.configuration, self.seed) for _ in range(2))
        for _ in range(2):  # what the first steps make by the way is there when faults come
            self._prepare()
            self._both(self.chance.getrandbits(32))

    def _prepare(self) -> None:
        put_right()
        seed, new_buffer = self.chance.getrandbits(32), self.chance.random() < 0.25
        for one in (self.subject, self.twin):
            one.prepare(seed, new_buffer)

    def _both(self, seed: int) -> None:
        for one in (self.subject, self.twin):
            seed_all(seed)
            one.act()
        self._update()

    def _update(self) -> None:
        for one in (self.subject, self.twin):
            one.update()

    def undisturbed(self, strike: Strike) -> None:
        """A step of both, the subject's watched by `strike`, which does nothing to it."""
        self._prepare()
        seed = self.chance.getrandbits(32)
        seed_all(seed)
        strike(self.subject.act)
        seed_all(seed)
        self.twin.act()
        self._update()

    def trial(self, strike: Strike) -> Verdict:
        """One fault, and the step after it."""
        self._prepare()
        seed, next_seed = self.chance.getrandbits(32), self.chance.getrandbits(32)
        seed_all(seed)
        before = self.subject.state()
        struck = strike(self.subject.act)
        where = described(struck.error)
        kept = [struck.error] if self.chance.random() < 0.5 else []  # as a notebook keeps it, frames and all
        late = at_the_entry_of_an_end(struck.error)
        struck = struck._replace(error=None)
        if late:
            kept.clear()
            gc.collect()
        recovery = _attempt(self.subject.recover)
        outcome, violations = self._judge(before, struck, seed)
        outcome = WINDOW if late and not violations else outcome
        violations += [Violation("stays busy", f"restore() says {recovery!r}")] if recovery else []
        violations += self._next(next_seed, compare=not violations)
        violations += [] if violations else self._let_go(kept)
        if violations:
            self._renew()
        else:
            self._update()
        return Verdict(outcome, [Violation(kind, f"{what} | {where}") for kind, what in violations])

    def _other(self, twin: State, mine: State) -> list[str]:
        """Where the two differ after a step that both have done."""
        return differences(twin, mine, places=False)

    def _let_go(self, kept: list[BaseException | None]) -> list[Violation]:
        """An error that goes takes its frames along, at once or with a cycle: none of them may touch the model."""
        before = self.subject.state()
        kept.clear()
        gc.collect()
        changed = differences(before, self.subject.state())
        return [Violation("differs", f"when the error is let go: {_short(changed)}")] if changed else []

    def _judge(self, before: State, struck: Struck, seed: int) -> tuple[str, list[Violation]]:
        after = self.subject.state()
        changed = differences(before, after)
        if not changed and not struck.returned:
            return BEFORE, []
        put_right()
        seed_all(seed)
        self.twin.act()
        self.twin.recover()
        done = self.twin.state()
        other = differences(done, after, places=False)
        if not other:
            return (UNSTRUCK if not struck.fired else RETURNED if struck.returned else AFTER), []
        return WRONG, _violations(other if struck.returned else changed)

    def _next(self, seed: int, compare: bool) -> list[Violation]:
        """The step after the fault, which knows nothing of it."""
        seed_all(seed)
        error = _attempt(self.subject.act)
        if error is not None:
            return [Violation("stays busy", f"the next call says {error!r}")]
        if not compare:
            return []
        after, answers = self.subject.state(), self.subject.answers()
        seed_all(seed)
        self.twin.act()
        wrong = self._other(self.twin.state(), after)
        expected = self.twin.answers()
        wrong += differences(State(expected, {}, []), State(answers, {}, []))
        return [Violation("differs", f"after the next step: {_short(wrong)}")] if wrong else []


def _violations(changed: list[str]) -> list[Violation]:
    weights = [name for name in changed if name.startswith((WEIGHT, "_parameters of"))]
    others = [name for name in changed if name not in weights]
    found = [Violation("wrong weights", _short(weights))] if weights else []
    return found + ([Violation("other traces", _short(others))] if others else [])


def _short(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _attempt(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - whatever it is, it must not be
        return error
    return None


def at_the_entry_of_an_end(error: BaseException | None) -> bool:
    """Whether an exception came from nowhere as the end of a `with` block was entered. Signals do not: they wait."""
    frames = [] if error is None else [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = [frame.f_code for frame in frames if frame.f_code.co_filename.startswith(PACKAGE)]
    return bool(ours) and ours[-1] is Block.__exit__.__code__


def described(error: BaseException | None) -> str:
    """An error and where in fastadv it was raised."""
    if error is None:
        return "no exception"
    frames = [one for one in traceback.extract_tb(error.__traceback__) if one.filename.startswith(PACKAGE)]
    places = [f"{Path(one.filename).name}:{one.lineno} {one.name}" for one in frames[-2:]]
    return f"{type(error).__name__} in {' > '.join(places) or 'the caller'}"
