"""A log of JSON Lines that survives a crash: rows with a phase and a step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadv.integrations import files

END = "train_runtime"  # in the row that the Trainer logs when it is through, or stopped


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row, and have it on the disk."""
    with path.open("ab") as file:
        file.write((json.dumps(row) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_log(path: Path, phase: str | None = None) -> list[dict[str, Any]]:
    """Read a log, or the rows of one phase. A line that a crash cut off, within a character too, is skipped."""
    rows = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                named, step = row["phase"], row["step"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if isinstance(step, int) and (phase is None or named == phase):
                rows.append(row)
    return rows


def rewind(path: Path, phase: str, step: int) -> None:
    """Drop the rows of `phase` after `step`, and of its end: a resumed training writes them again."""
    rows = [row for row in read_log(path) if row["phase"] != phase or (row["step"] <= step and END not in row)]
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows))
