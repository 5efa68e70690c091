"""Trials of drawn configurations: what the campaigns against steps have in common."""

from __future__ import annotations

import contextlib
import gc
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.campaigns.configurations import ACTIONS, Configuration, draw
from tests.campaigns.faults import NEVER, AtCall, AtOperation, drawn
from tests.campaigns.interrupts import AtRandom, Interrupts, interrupts, seconds
from tests.campaigns.pair import Pair, Strike, Struck
from tests.campaigns.result import Result

EACH = 25  # trials of one configuration
Measure = Callable[[Pair], float]
Fault = Callable[[random.Random, float], Strike]


def torch_operations(count: int, seed: int) -> Result:
    return run(count, seed, operations, at_operation)


def python_calls(count: int, seed: int) -> Result:
    return run(count, seed, calls, at_call)


def signals_at_calls(count: int, seed: int) -> Result:
    return run(count, seed, calls, signal_at_call)


def second_faults(count: int, seed: int) -> Result:
    """An operation fails, and another one that deals with it; or anything fails, and then comes a SIGINT."""
    found = run(count // 2, seed, operations, twice_at_operations)
    found.add(run(count - count // 2, seed, calls, then_a_signal))
    return found


def faults_in_the_clean_up(count: int, seed: int) -> Result:
    """The second exception comes out of nowhere, at the entry of whatever function deals with the first."""
    return run(count, seed, calls, twice_at_calls)


def sigints(count: int, seed: int) -> Result:
    with interrupts() as source:
        return run(count, seed, duration, lambda chance, length: AtRandom(source, chance, length, 1))


def storms(count: int, seed: int) -> Result:
    def storm(source: Interrupts) -> Fault:
        return lambda chance, length: AtRandom(source, chance, length, chance.randrange(2, 9))

    with interrupts() as source:
        return run(count, seed, duration, storm(source))


def compiled(count: int, seed: int) -> Result:
    """Faults at operations and calls of a model that torch.compile has compiled."""
    found = Result()
    for part, backend in enumerate(("eager", "aot_eager")):
        share = count // 2
        options: dict[str, Any] = {"actions": ("backward", "find", "unattacked"), "compiled": backend, "each": 50}
        found.add(run(share // 2, seed + part, operations, at_operation, **options))
        found.add(run(share - share // 2, seed + part, calls, at_call, **options))
    return found


# What is measured of a step, and a fault somewhere in it


def operations(pair: Pair) -> float:
    watch = AtOperation(NEVER, [])
    pair.undisturbed(watch)
    return watch.count


def at_operation(chance: random.Random, count: float) -> Strike:
    return AtOperation(chance.randrange(int(count)), drawn(chance, 1), done=chance.random() < 0.5)


def twice_at_operations(chance: random.Random, count: float) -> Strike:
    return AtOperation(chance.randrange(int(count)), drawn(chance, 2), later=chance.randrange(1, 20))


def calls(pair: Pair) -> float:
    watch = AtCall(NEVER, [])
    pair.undisturbed(watch)
    return watch.count


def at_call(chance: random.Random, count: float) -> Strike:
    errors = drawn(chance, 1) if chance.random() < 0.5 else [KeyboardInterrupt()]
    return AtCall(chance.randrange(int(count)), [*errors])


def twice_at_calls(chance: random.Random, count: float) -> Strike:
    return AtCall(chance.randrange(int(count)), [*drawn(chance, 2)], later=chance.randrange(1, 60))


def then_a_signal(chance: random.Random, count: float) -> Strike:
    return AtCall(chance.randrange(int(count)), [*drawn(chance, 1), None], later=chance.randrange(1, 60))


def signal_at_call(chance: random.Random, count: float) -> Strike:
    return AtCall(chance.randrange(int(count)), [None])


def duration(pair: Pair) -> float:
    """Of a step, in seconds: the median of three."""
    found: list[float] = []

    def timed(action: Callable[[], None]) -> Struck:
        found.append(seconds(action))
        return Struck(False, True, None)

    for _ in range(3):
        pair.undisturbed(timed)
    return sorted(found)[1]


# The loop


def run(
    count: int,
    seed: int,
    measure: Measure,
    fault: Fault,
    actions: tuple[str, ...] = ACTIONS,
    compiled: str | None = None,
    each: int = EACH,
    pair: Callable[[Configuration, int], Pair] = Pair,
) -> Result:
    """`count` trials, `each` of one configuration."""
    result, chance = Result(), random.Random(seed)
    with _quiet(result):
        for configuration in draw(seed, actions, compiled):
            if result.cases >= count:
                break
            torch._dynamo.reset()
            _one(result, pair(configuration, seed), min(each, count - result.cases), chance, measure, fault)
    return result


def _one(result: Result, pair: Pair, count: int, chance: random.Random, measure: Measure, fault: Fault) -> None:
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # what is there to stay need not be looked at by every trial's collection
    size = measure(pair)
    for _ in range(count):
        verdict = pair.trial(fault(chance, size))
        result.cases += 1
        result.outcomes[verdict.outcome] += 1
        for kind, what in verdict.violations:
            result.violate(kind, f"{pair.configuration} | {what}")


@contextlib.contextmanager
def _quiet(result: Result) -> Iterator[None]:
    """Garbage is collected when a trial says so. Exceptions that Python can only print (in `__del__`) are counted."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: result.outcomes.update(["swallowed by Python"])
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gc.unfreeze()
        gc.enable()
        sys.unraisablehook = hook
