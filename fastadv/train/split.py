"""Split rows into training and test rows without leaks. The split is part of the data: no --seed changes it."""

from __future__ import annotations

import random
from collections.abc import Iterable

from fastadv.train.labels import classes_of
from fastadv.train.sources import Row

SPLIT_SEED = 0


def shuffler(seed: int | str) -> random.Random:
    """Make a generator that nothing else draws from: the order of the data follows from `seed` alone."""
    return random.Random(seed)  # noqa: S311 - not for secrets


def split(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Hold out a part of the rows to test on, in random order.

    Whole groups go to one side. Without groups each class keeps its share on both sides, as far as it has rows: two
    are one on each side, and a single one is trained on. Sets of classes and numbers are split by chance. What holds a
    class that training would not see is trained on.
    """
    grouped = any(row.group is not None for row in rows)
    stratified = not grouped and all(isinstance(row.label, str) for row in rows)
    generator = shuffler(SPLIT_SEED)
    held_out = _by_class(rows, fraction) if stratified else _by_group(rows, fraction, generator)
    _give_back(rows, held_out)
    train = [row for row in rows if _group(row) not in held_out]
    test = [row for row in rows if _group(row) in held_out]
    generator.shuffle(test)
    return train, test


def part(rows: list[Row], count: int) -> list[Row]:
    """Take the first `count` of the training rows; in place of the last of them one of each class that they lack."""
    taken = rows[:count]
    known, missing = set(_classes(taken)), []
    for row in rows[count:]:
        if not known.issuperset(classes_of(row)):
            known.update(classes_of(row))
            missing.append(row)
    return taken[: max(0, count - len(missing))] + missing[:count]


def _group(row: Row) -> str:
    """Name what stays together: a row without a group is its own."""
    return row.text if row.group is None else row.group


def _classes(rows: Iterable[Row]) -> list[str]:
    return [name for row in rows for name in classes_of(row)]


def _by_group(rows: list[Row], fraction: float, generator: random.Random) -> set[str]:
    groups = sorted({_group(row) for row in rows})
    generator.shuffle(groups)
    return set(groups[: max(1, round(len(groups) * fraction))])


def _by_class(rows: list[Row], fraction: float) -> set[str]:
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(row.label, []).append(row.text)
    held_out: set[str] = set()
    for name, mine in texts.items():
        mine.sort()
        shuffler(f"{SPLIT_SEED} {name}").shuffle(mine)
        wanted = max(1, round(len(mine) * fraction))
        held_out.update(mine[: min(wanted, len(mine) - 1)])
    return held_out


def _give_back(rows: list[Row], held_out: set[str]) -> None:
    """Take out of `held_out` the groups that have a class which nothing else has."""
    known = set(_classes(row for row in rows if _group(row) not in held_out))
    for row in rows:
        if _group(row) in held_out and not known.issuperset(classes_of(row)):
            held_out.remove(_group(row))
            known.update(_classes(other for other in rows if _group(other) == _group(row)))
