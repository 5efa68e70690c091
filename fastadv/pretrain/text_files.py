"""Documents of files: text, JSON Lines, JSON, CSV, TSV, Parquet; several, patterns and folders of them."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastadv.jobs import formats
from fastadv.jobs.errors import UserError
from fastadv.pretrain.source import Text

TEXT = ".txt"
ENDINGS = (TEXT, *formats.READERS)
ENDS = 2**20  # bytes of a file's beginning and end that its fingerprint reads


def is_files(data: str) -> bool:
    """Tell whether `--data` means files, and not a data set of the hub."""
    return any(_exists(part) or _is_pattern(part) or part.lower().endswith(ENDINGS) for part in _parts(data))


def file_text(data: str, column: str) -> Text:
    """Find files: one, several with commas between them, patterns (`part-*.jsonl`), or folders, which are searched.

    A `.txt` file in which blank lines stand between lines holds a document between each two of them; any other holds
    one on each line. The other formats hold one in each row's `column`. Files of a pattern or a folder come in the
    order of their names.

    Raises:
        UserError: a file is missing, or of no known format; a pattern or folder has none. While the documents are
            read: a file that cannot be, a row without the column, or with something else than text in it.
    """
    paths = list(dict.fromkeys(path for part in _parts(data) for path in _files(part)))
    digest = hashlib.sha256(column.encode())
    for path in paths:
        digest.update(_fingerprint(path))
    what = str(paths[0]) if len(paths) == 1 else f"{len(paths)} files of {data}"
    return Text(what, f"files {digest.hexdigest()[:32]}", lambda: _documents(paths, column))


def _parts(data: str) -> list[str]:
    return [data] if _exists(data) else [part for part in data.split(",") if part]


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long, or with a NUL
        return False


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name)


def _files(part: str) -> list[Path]:
    path = Path(part)
    if _exists(part):
        if not path.is_dir():
            return [_known(path)]
        found = [one for one in sorted(path.rglob("*")) if _is_data(one, path)]
    elif _is_pattern(part):
        names = sorted(glob.glob(part, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [_known(Path(name)) for name in names if Path(name).is_file()]
    else:
        raise UserError(f"the data file {part} does not exist: check --data and --eval-data")
    if not found:
        raise UserError(f"{part} has no files ({', '.join(ENDINGS)}): check --data and --eval-data")
    return found


def _known(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is a pipe or a device: save its text in a file, and give that")
    if path.suffix.lower() not in ENDINGS:
        raise UserError(
            f"the ending of {path} names no format that can be read ({', '.join(ENDINGS)}): rename or convert it"
        )
    return path


def _is_data(path: Path, folder: Path) -> bool:
    hidden = any(name.startswith(".") for name in path.relative_to(folder).parts)
    return path.suffix.lower() in ENDINGS and not hidden and path.is_file()


def _fingerprint(path: Path) -> bytes:
    """Hash a file's name, size, beginning and end: all of a large one would take minutes. Its time may change."""
    digest = hashlib.sha256(f"{path.name} {path.stat().st_size}".encode("utf-8", "surrogateescape"))
    with formats.reading(path), path.open("rb") as file:
        digest.update(file.read(ENDS))
        file.seek(max(0, path.stat().st_size - ENDS))
        digest.update(file.read(ENDS))
    return digest.digest()


def _documents(paths: Sequence[Path], column: str) -> Iterator[str]:
    for path in paths:
        yield from _lines(path) if path.suffix.lower() == TEXT else _column(path, column)


def _lines(path: Path) -> Iterator[str]:
    if not _has_paragraphs(path):
        with formats.opened(path) as file:
            yield from (line.rstrip("\r\n") for line in file)
        return
    lines: list[str] = []
    with formats.opened(path) as file:
        for line in file:
            if line.strip():
                lines.append(line.rstrip("\r\n"))
            elif lines:
                yield "\n".join(lines)
                lines = []
    if lines:
        yield "\n".join(lines)


def _has_paragraphs(path: Path) -> bool:
    """Look for a line, a blank one and a line."""
    text = blank = False
    with formats.opened(path) as file:
        for line in file:
            if not line.strip():
                blank = text
            elif blank:
                return True
            else:
                text = True
    return False


def _column(path: Path, column: str) -> Iterator[str]:
    with formats.long_cells():
        for where, row in formats.READERS[path.suffix.lower()](path):
            yield text_of(row, column, f"{path}, {where}")


def text_of(row: object, column: str, where: str) -> str:
    """Take the text out of a row; nothing of a null one.

    Raises:
        UserError: the row has no such column, or something else than text in it.
    """
    if not isinstance(row, dict) or column not in row:
        has = ", ".join(str(name)[:40] for name in list(row)[:20]) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"{where}: no column {column!r} (there is {has}): set --text-column")
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {column} holds {type(value).__name__}, which is no text: set --text-column")
    return value or ""
