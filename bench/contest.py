"""A contest: contestants that are held against each other first, and then timed in one race."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from bench.race import Copy, Entry, Result, race


class Field(NamedTuple):
    """Who takes part, and in what."""

    entries: Mapping[str, Entry]
    moved: int | None = None  # bytes that the work has to move
    shape: tuple[int, ...] = ()
    tolerance: float = 1e-4  # how far answers may be from the first one's, relative
    rewind: Callable[[], object] = lambda: None  # inputs rotate with each `setup`; this puts the first one in place
    weighed: bool = True  # whether one more run of each shows its peak memory
    floor: float = 0.0  # an answer smaller than that share of all of them is rounding, and is held against that share


class Case(NamedTuple):
    """What the registry knows of a contest: whose rounds are shown, and how it is run."""

    make: Callable[[], Field]
    contestants: Sequence[str]
    rounds: int = 15
    retained: int = 0  # rounds with the heap that keeps what was freed; 0: it is timed on the users' heap alone
    warmup: int = 2
    budget: float = 4.0  # seconds that a contestant may take before it sits out
    quick: bool = False  # belongs to `-m quick`
    extra: Mapping[str, Any] = {}  # what else the report needs


def contest(field: Field, rounds: int, copy: Copy, **limits: Any) -> Result:
    taken = check(field)
    result = race(field.entries, rounds, copy, taken=taken, **limits)
    return result if field.moved is None else result.with_limit(field.moved)


def check(field: Field) -> dict[str, float]:
    """There is no figure for a wrong answer: everyone's against the first one's. The seconds that each has taken."""
    taken: dict[str, float] = {}
    want: list[Tensor] = []
    for name, entry in field.entries.items():
        if not entry.compared:
            continue
        start = time.perf_counter()
        found = answer(field, entry)
        taken[name] = time.perf_counter() - start
        want = want or [one.detach().clone() for one in found]
        assert len(found) == len(want) > 0, f"{name} gives {len(found)} answers, and the first {len(want)}"
        least = field.floor * float(sum(one.double().square().sum() for one in want)) ** 0.5 if field.floor else 0.0
        apart = [difference(one, right, least) for one, right in zip(found, want, strict=True)]
        wrong = [index for index, one in enumerate(apart) if not one <= field.tolerance]
        assert not wrong, f"{name}: answer {wrong[0]} is not the first contestant's ({apart[wrong[0]]:.1e})"
    return taken


def answer(field: Field, entry: Entry) -> list[Tensor]:
    """What an entry finds on the first input."""
    field.rewind()
    entry.setup()
    return list(tensors((entry.answer or entry.run)()))


def difference(one: Tensor, other: Tensor, least: float = 0.0) -> float:
    """How far apart, relative to `other`, or to `least` if that is more; 0 where both are rounding.

    Infinity, or NaN, where nothing can be said.
    """
    if one.shape != other.shape:
        return float("inf")
    apart, size = float((one.double() - other.double()).norm()), max(least, float(other.double().norm()))
    if apart <= 1e-7 * other.numel() ** 0.5 and other.is_floating_point():
        return 0.0
    return apart / size if size else float("inf") if apart else 0.0


def tensors(found: object) -> Iterator[Tensor]:
    """The tensors of an answer, in order."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (tuple, list)):
        for one in found:
            yield from tensors(one)
