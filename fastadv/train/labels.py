"""Read labels: classes, sets of classes, or numbers. The task says which."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fastadv.jobs.errors import UserError
from fastadv.train.sources import Row, short

CLASSIFICATION, MULTI_LABEL, REGRESSION = "classification", "multi-label", "regression"
AUTO = "auto"
# What transformers calls them, in the configuration of a model.
PROBLEM_TYPES = {
    CLASSIFICATION: "single_label_classification",
    MULTI_LABEL: "multi_label_classification",
    REGRESSION: "regression",
}
SEPARATOR = ";"
DIGITS = 4000  # of a class that is taken for a whole number: Python reads no longer ones
LARGEST = 1e30  # of the numbers to learn: float32, which models compute in, holds little more

# A class's number; 1 or 0 per class of several; a number.
Label = int | float | tuple[float, ...]


class Scale(NamedTuple):
    """Hold mean and deviation of the numbers to learn: the training sees them standardised, whatever their unit."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Scale:
        """Measure the numbers of the training samples."""
        return cls(statistics.fmean(numbers), statistics.pstdev(numbers))

    def standardised(self, number: float) -> float:
        """Move and stretch a number so that the training's have mean 0 and deviation 1."""
        return (number - self.mean) / self.deviation


def choose_task(task: str, rows: Iterable[Row], separator: str | None) -> str:
    """Name the task; with "auto" find it by the labels: lists are sets of classes, fractions numbers, the rest classes.

    Raises:
        UserError: there is no such task.
    """
    if task not in (AUTO, *PROBLEM_TYPES):
        raise UserError(f"there is no --task {task}: choose one of {', '.join((AUTO, *PROBLEM_TYPES))}")
    if task != AUTO:
        return task
    labels = [row.label for row in rows]
    if separator is not None or any(isinstance(label, (list, tuple)) for label in labels):
        return MULTI_LABEL
    numbers = [_number(label) for label in labels]
    fractions = any(number is not None and not number.is_integer() for number in numbers)
    return REGRESSION if fractions and None not in numbers else CLASSIFICATION


def task_of(problem_type: str | None) -> str:
    """Name the task of a model by its configuration, which says nothing where transformers leaves it to the labels."""
    names = {theirs: ours for ours, theirs in PROBLEM_TYPES.items()}
    return names.get(problem_type or "", CLASSIFICATION)


def read(rows: Sequence[Row], task: str, separator: str | None, source: str) -> list[Row]:
    """Turn labels as the file has them into names of classes, tuples of such names, or numbers.

    Raises:
        UserError: a label does not fit the task.
    """
    if task == CLASSIFICATION:
        return [row._replace(label=_class(row.label, source)) for row in rows]
    if task == REGRESSION:
        return [row._replace(label=_finite(row.label, source)) for row in rows]
    between = SEPARATOR if separator is None else separator
    read = [row._replace(label=_set(row.label, between)) for row in rows]
    if separator is None and all(isinstance(row.label, str) and between not in row.label for row in rows):
        raise UserError(
            f"no label of {source} holds {between!r}, so each would be one class: say what is between the classes "
            "with --label-separator, or leave out --task multi-label"
        )
    return read


def classes_of(row: Row) -> tuple[str, ...]:
    """List the classes of a row that `read` returned; none where its label is a number."""
    if isinstance(row.label, tuple):
        return row.label
    return (row.label,) if isinstance(row.label, str) else ()


def class_names(rows: Iterable[Row]) -> list[str]:
    """List the classes in the order of their numbers: by name, or by value where all are integers."""
    names = sorted({name for row in rows for name in classes_of(row)})
    whole = all(name.removeprefix("-").isdecimal() and len(name) <= DIGITS for name in names)
    return sorted(names, key=int) if whole else names


def encode(row: Row, numbers: dict[str, int]) -> Label:
    """Encode a label as models take it. `numbers`: of the classes, by name."""
    if isinstance(row.label, tuple):
        mine = {numbers[name] for name in row.label}
        return tuple(float(number in mine) for number in range(len(numbers)))
    return float(row.label) if isinstance(row.label, float) else numbers[row.label]


def _class(label: Any, source: str) -> str:
    if isinstance(label, (list, tuple)):
        raise UserError(f"labels of {source} are lists ({label!r}): --task multi-label")
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label).strip()


def _set(label: Any, separator: str) -> tuple[str, ...]:
    parts = label if isinstance(label, (list, tuple)) else str(label).split(separator)
    named = (str(part).strip() for part in parts)
    return tuple(dict.fromkeys(name for name in named if name))


def _finite(label: Any, source: str) -> float:
    number = _number(label)
    if number is not None and abs(number) > LARGEST:
        raise UserError(f"{source} has the label {number:g}: models learn numbers up to {LARGEST:g}. Scale them down")
    if number is None:
        raise UserError(
            f"{source} has the label {short(label)}, which is no number: --task regression learns numbers. Remove such "
            "rows (--skip-empty, where it stands for none), or take labels as classes with --task classification"
        )
    return number


def _number(label: Any) -> float | None:
    try:
        number = float(label)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
