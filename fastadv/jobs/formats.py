"""Read files row by row: CSV, TSV, JSON Lines, a JSON list, Parquet. Each row comes with the place where it is."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from fastadv.jobs.errors import UserError, loading

Rows = Iterator[tuple[str, Mapping[str, Any]]]
LONGEST_CELL = 2**31 - 1  # the most that the csv module takes on every system


@contextmanager
def long_cells() -> Iterator[None]:
    """Let the csv module read cells of any length inside: its own limit is 131,072 characters."""
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line what keeps a file from being read.

    Raises:
        UserError: it is missing or not open to this user, or what is read of it inside is not UTF-8.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """Open a file of text, its line ends as they are; errors as of `reading`."""
    with reading(path), path.open(encoding="utf-8-sig", newline="") as file:
        yield file


def _csv(path: Path) -> Rows:
    """Read a table with a header. The header tells whether commas, semicolons or tabs are between its cells."""
    with opened(path) as file:
        header = file.readline()
        delimiter = max(",;\t", key=header.count)
        yield from _table(itertools.chain([header], file), path, delimiter)


def _table(lines: Iterable[str], path: Path, delimiter: str) -> Rows:
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                what = {",": "commas", ";": "semicolons", "\t": "tabs"}[delimiter]
                raise UserError(
                    f"{path}, line {reader.line_num}: not as many fields as the header has: quote the {what}"
                )
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path}, after line {reader.line_num}: {error}: is a quote not closed?") from None


def _tsv(path: Path) -> Rows:
    """Read a table with tabs between its cells.

    Half of the programs that write such files quote cells as in CSV, the others never do. Where every line has as many
    tabs as the header, each is a row, and a quote that does not enclose a whole cell is text.
    """
    with opened(path) as file:
        lines = [line.rstrip("\r") for line in file.read().split("\n")]
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if len({line.count("\t") for _, line in filled}) > 1:
        yield from _table((line + "\n" for line in lines), path, "\t")
        return
    for index, (number, line) in enumerate(filled):
        cells = _cells(line)
        if index == 0:
            header = cells
        else:
            yield f"line {number}", dict(zip(header, cells, strict=True))


def _cells(line: str) -> list[str]:
    raw = line.split("\t")
    try:
        quoted = next(csv.reader([line], delimiter="\t", strict=True))
    except csv.Error:
        return raw
    return quoted if len(quoted) == len(raw) else raw


def _json(path: Path) -> Rows:
    """Read a list of objects, or one object a line."""
    with opened(path) as file:
        start = file.read(64).lstrip()
        file.seek(0)
        if not start.startswith("["):
            yield from _json_lines(path)
            return
        listed = _parsed(file.read(), path, "a list of objects is expected")
    for number, row in enumerate(listed, 1):
        yield f"row {number}", _object(row, f"{path}, row {number}: a list of objects is expected")


def _json_lines(path: Path) -> Rows:
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, expected = f"{path}, line {number}", "one JSON object a line is expected"
            yield f"line {number}", _object(_parsed(line, where, expected), f"{where}: {expected}")


def _parsed(text: str, where: object, expected: str) -> Any:
    """Parse JSON. What is JSON and cannot be held, in depth or in digits, is refused like what is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if isinstance(where, Path) else ""
        raise UserError(f"{where}{line}: not JSON ({error.msg}): {expected}") from None
    except RecursionError:
        raise UserError(f"{where}: lists or objects nested too deeply to be read: {expected}") from None
    except ValueError:
        most = sys.get_int_max_str_digits()
        raise UserError(f"{where}: a number of more than {most} digits: write it as a text, in quotes") from None


def _object(row: Any, complaint: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{complaint}, not {type(row).__name__}")
    return row


def _parquet(path: Path) -> Rows:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path} needs a package to be read: pip install pyarrow (or convert it to CSV)")
    from pyarrow import parquet

    number = 0
    with loading(f"{path} cannot be read", "write it again"), parquet.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}
