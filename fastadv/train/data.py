"""Load labelled texts (default data, CSV, JSON Lines, hub data sets), and split them without leaks."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.utils.data import Dataset, Sampler

from fastadv.train.errors import UserError
from fastadv.train.sources import Row, default_rows, file_rows, hub_rows, is_file_name

DEFAULT = "rotten-tomatoes"
SPLIT_SEED = 0  # the split is part of the data, not of the experiment: every --seed is tested on the same samples


@dataclass(frozen=True)
class DataSettings:
    """Say where the samples come from and how they are split."""

    data: str = DEFAULT
    test_data: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    group_column: str | None = None
    test_fraction: float = 0.2
    train_samples: int | None = None


@dataclass(frozen=True)
class Sample:
    """Hold a text and the number of its label."""

    text: str
    label: int


@dataclass(frozen=True)
class Samples:
    """Hold a data set that is ready to be tokenised."""

    train: list[Sample]
    test: list[Sample]
    labels: list[str]
    settings: DataSettings

    def description(self) -> dict[str, Any]:
        """Describe the samples for settings.json, so that `evaluate` can find and recognise the same test samples."""
        return {
            "settings": asdict(self.settings),
            "labels": self.labels,
            "train_samples": len(self.train),
            "test_samples": len(self.test),
            "test_fingerprint": fingerprint(self.test),
        }


def shuffler(seed: int | str) -> random.Random:
    """Make a generator that nothing else draws from: the order of the data follows from `seed` alone."""
    return random.Random(seed)  # noqa: S311 - not for secrets


def fingerprint(samples: Sequence[Sample]) -> str:
    """Hash the samples; a changed text, label or order gives another value."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.label}\t{sample.text}\n".encode())
    return digest.hexdigest()[:16]


def load(settings: DataSettings, labels: list[str] | None = None) -> Samples:
    """Read, check and split. `labels`: those of a checkpoint (default: the training data's).

    Raises:
        UserError: a missing file or column, a row without a text or label, no rows, one class only,
            a test label that no training sample has.
    """
    if not 0 < settings.test_fraction < 1:
        raise UserError(f"--test-fraction must be between 0 and 1, not {settings.test_fraction}")
    train_rows, test_rows = _read(settings)
    if test_rows is None:
        train_rows, test_rows = _split(_distinct(train_rows), settings.test_fraction)
    else:
        seen = {_key(row.text) for row in test_rows}
        train_rows = [row for row in _distinct(train_rows) if _key(row.text) not in seen]
    if not train_rows or not test_rows:
        raise UserError(f"{settings.data} leaves no samples to {'train' if test_rows else 'test'} on: give more data")
    shuffler(SPLIT_SEED).shuffle(train_rows)
    if settings.train_samples is not None:
        train_rows = train_rows[: settings.train_samples]
    names = labels or sorted({row.label for row in train_rows})
    _check_labels(names, train_rows, test_rows, settings)
    number = {name: index for index, name in enumerate(names)}
    train, test = ([Sample(row.text, number[row.label]) for row in rows] for rows in (train_rows, test_rows))
    return Samples(train, test, names, settings)


def load_test(settings: DataSettings, labels: list[str]) -> list[Sample]:
    """Load all rows of one source as test samples, for a model that knows `labels`."""
    rows, more = _read(settings)
    rows = more if more is not None else rows
    if not rows:
        raise UserError(f"{settings.data} has no rows")
    _check_known(labels, rows, settings)
    return [Sample(row.text, labels.index(row.label)) for row in rows]


def _read(settings: DataSettings) -> tuple[list[Row], list[Row] | None]:
    """Read training rows, and test rows where the source has its own."""
    if settings.data == DEFAULT:
        return default_rows(), None
    columns = (settings.text_column, settings.label_column, settings.group_column)
    if is_file_name(settings.data):
        rows: list[Row] = file_rows(settings.data, *columns)
        test = None
    else:
        rows, test = hub_rows(settings.data, *columns)
    if settings.test_data is not None:
        test = file_rows(settings.test_data, *columns)
    return rows, test


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _distinct(rows: list[Row]) -> list[Row]:
    """Keep the first of rows with the same text: on both sides of a split it would be a leak."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(_key(row.text), row)
    return list(first.values())


def _split(rows: list[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Put whole groups on one side; a row without a group is its own."""
    names = [row.text if row.group is None else row.group for row in rows]
    groups = sorted(set(names))
    generator = shuffler(SPLIT_SEED)
    generator.shuffle(groups)
    held_out = set(groups[: max(1, round(len(groups) * fraction))])
    train = [row for row, name in zip(rows, names, strict=True) if name not in held_out]
    test = [row for row, name in zip(rows, names, strict=True) if name in held_out]
    generator.shuffle(test)
    return train, test


def _check_labels(names: list[str], train: list[Row], test: list[Row], settings: DataSettings) -> None:
    if len({row.label for row in train}) < 2:
        raise UserError(
            f"every training sample of {settings.data} has the label {train[0].label!r}: a classifier needs two "
            f"classes. Is --label-column {settings.label_column!r} the right one?"
        )
    _check_known(names, train, settings)
    _check_known(names, test, settings)


def _check_known(names: list[str], rows: list[Row], settings: DataSettings) -> None:
    unknown = sorted({row.label for row in rows} - set(names))
    if unknown:
        raise UserError(
            f"{settings.test_data or settings.data} has the label {unknown[0]!r}, which was not seen in training "
            f"(known: {', '.join(map(repr, names[:10]))}): remove those rows, or train on data that have it"
        )


class Tokens(Dataset[dict[str, Any]]):
    """Tokenise samples for the Trainer; the collator pads, batch by batch."""

    def __init__(self, samples: Sequence[Sample], tokenizer: Any, max_length: int) -> None:
        encoded = tokenizer([sample.text for sample in samples], truncation=True, max_length=max_length)
        self.items = [
            {"input_ids": ids, "attention_mask": mask, "labels": sample.label}
            for sample, ids, mask in zip(samples, encoded["input_ids"], encoded["attention_mask"], strict=True)
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def lengths(self) -> list[int]:
        """Count the tokens of each sample."""
        return [len(item["input_ids"]) for item in self.items]


class LengthGrouped(Sampler[int]):
    """Draw batches of similar length, in random order.

    The order follows from the seed and the epoch alone: two runs see the same batches whatever else they draw from
    torch's generator, and a resumed one continues where it stopped.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 50) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.pool = pool
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch; the data loader calls this at its beginning."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = shuffler(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        generator.shuffle(order)
        size = self.batch_size
        pools = [order[start : start + size * self.pool] for start in range(0, len(order), size * self.pool)]
        batches: list[list[int]] = []
        for pool in pools:
            pool.sort(key=self.lengths.__getitem__)
            batches += [pool[start : start + size] for start in range(0, len(pool), size)]
        short = [batch for batch in batches if len(batch) < size]
        batches = [batch for batch in batches if len(batch) == size]
        generator.shuffle(batches)
        return iter([index for batch in batches + short for index in batch])
