"""Load labelled texts (default data, files, hub data sets), and split them without leaks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastadv.jobs.errors import UserError
from fastadv.train import labels as reading
from fastadv.train.hub import hub_rows
from fastadv.train.labels import CLASSIFICATION, REGRESSION, Label
from fastadv.train.sources import Columns, Found, Row, default_rows, file_rows, is_file_name, short
from fastadv.train.split import SPLIT_SEED, part, shuffler, split

DEFAULT = "rotten-tomatoes"


@dataclass(frozen=True)
class DataSettings:
    """Say where the samples come from, what their labels are, and how they are split."""

    data: str = DEFAULT
    test_data: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    group_column: str | None = None
    test_fraction: float = 0.2
    train_samples: int | None = None
    task: str = reading.AUTO
    label_separator: str | None = None
    skip_empty: bool = False

    @property
    def columns(self) -> Columns:
        """What to read of each row."""
        return Columns(self.text_column, self.label_column, self.group_column, self.skip_empty)


@dataclass(frozen=True)
class Sample:
    """Hold a text and its label: the number of its class, a 1 or 0 per class, or a number to learn."""

    text: str
    label: Label


@dataclass(frozen=True)
class LeftOut:
    """Count the rows that are neither trained nor tested on."""

    empty: int = 0  # no text or label, with --skip-empty
    repeated: int = 0  # the text again; or in the test file too
    contradicting: int = 0  # of these, those with another label


@dataclass(frozen=True)
class Samples:
    """Hold a data set that is ready to be tokenised."""

    train: list[Sample]
    test: list[Sample]
    labels: list[str]  # the classes; for regression, the column
    settings: DataSettings
    task: str = CLASSIFICATION
    left_out: LeftOut = LeftOut()

    def description(self) -> dict[str, Any]:
        """Describe the samples for settings.json, so that `evaluate` can find and recognise the same test samples."""
        return {
            "settings": asdict(self.settings),
            "labels": self.labels,
            "train_samples": len(self.train),
            "test_samples": len(self.test),
            "test_fingerprint": fingerprint(self.test),
        }


def fingerprint(samples: Sequence[Sample]) -> str:
    """Hash the samples; a changed text, label or order gives another value."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.label}\t{sample.text}\n".encode())
    return digest.hexdigest()[:16]


def load(settings: DataSettings, labels: list[str] | None = None) -> Samples:
    """Read, check and split. `labels`: those of a checkpoint (default: the training data's).

    Raises:
        UserError: a missing file or column, a row without a text or label, a label that does not fit the task, no rows,
            one class only, a test label that no training sample has.
    """
    if not 0 < settings.test_fraction < 1:
        raise UserError(f"--test-fraction must be between 0 and 1, not {settings.test_fraction}")
    found, test_found = _read(settings)
    task = reading.choose_task(settings.task, found.rows, settings.label_separator)
    rows = reading.read(found.rows, task, settings.label_separator, settings.data)
    distinct = _distinct(rows)
    if test_found is None:
        train_rows, test_rows = split(distinct, settings.test_fraction)
    else:
        test_rows = reading.read(test_found.rows, task, settings.label_separator, settings.test_data or settings.data)
        seen = {_key(row.text) for row in test_rows}
        train_rows = [row for row in distinct if _key(row.text) not in seen]
    if not train_rows or not test_rows:
        raise UserError(f"{settings.data} leaves no samples to {'train' if test_rows else 'test'} on: give more data")
    shuffler(SPLIT_SEED).shuffle(train_rows)
    used = len(train_rows) if test_found is not None else len(distinct)
    if settings.train_samples is not None:
        train_rows = part(train_rows, settings.train_samples)
    names = labels or ([settings.label_column] if task == REGRESSION else reading.class_names(train_rows))
    _check_labels(names, train_rows, test_rows, settings, task)
    return Samples(
        _samples(train_rows, names),
        _samples(test_rows, names),
        names,
        settings,
        task,
        LeftOut(
            found.skipped + (0 if test_found is None else test_found.skipped), len(rows) - used, _contradicting(rows)
        ),
    )


def load_test(settings: DataSettings, labels: list[str], task: str = CLASSIFICATION) -> list[Sample]:
    """Load all rows of one source as test samples, for a model that knows `labels`."""
    found, more = _read(settings)
    rows = reading.read((more or found).rows, task, settings.label_separator, settings.data)
    _check_known(labels, rows, settings)
    return _samples(rows, labels)


def _read(settings: DataSettings) -> tuple[Found, Found | None]:
    """Read training rows, and test rows where the source has its own."""
    if settings.data == DEFAULT:
        return Found(default_rows()), None
    test: Found | None = None
    if is_file_name(settings.data):
        found = file_rows(settings.data, settings.columns)
    else:
        found, test = hub_rows(settings.data, settings.columns)
    if settings.test_data is not None:
        test = file_rows(settings.test_data, settings.columns)
    return found, test


def _samples(rows: list[Row], names: list[str]) -> list[Sample]:
    numbers = {name: index for index, name in enumerate(names)}
    return [Sample(row.text, reading.encode(row, numbers)) for row in rows]


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _distinct(rows: list[Row]) -> list[Row]:
    """Keep the first of rows with the same text: on both sides of a split it would be a leak."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(_key(row.text), row)
    return list(first.values())


def _contradicting(rows: list[Row]) -> int:
    """Count the rows that give a text another label than the row that is kept."""
    first: dict[str, Any] = {}
    return sum(first.setdefault(_key(row.text), row.label) != row.label for row in rows)


def _check_labels(names: list[str], train: list[Row], test: list[Row], settings: DataSettings, task: str) -> None:
    distinct = {row.label for row in train}
    if len(distinct) < 2:
        needs = "numbers to learn must differ" if task == REGRESSION else "a classifier needs two classes"
        raise UserError(
            f"every training sample of {settings.data} has the label {short(train[0].label)}: {needs}. Is "
            f"--label-column {settings.label_column!r} the right one?"
        )
    _check_known(names, train, settings)
    _check_known(names, test, settings)


def _check_known(names: list[str], rows: list[Row], settings: DataSettings) -> None:
    unknown = sorted({name for row in rows for name in reading.classes_of(row)} - set(names))
    if unknown:
        raise UserError(
            f"{settings.test_data or settings.data} has the label {short(unknown[0])}, which was not seen in training "
            f"(known: {', '.join(map(short, names[:10]))}): remove those rows, or train on data that have it"
        )
