"""The figures, seen from outside: a process that goes through the rows by its journal, and is started again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.workers import Worker

ROWS = "bench.gpu.rows:rows"
APART = ": "  # a row's section from its name

Found = dict[str, dict[str, dict[str, Any]]]


def run(rows: str, device: str, folder: Path, end: float, keep: Callable[[Found], None]) -> Found:
    """By section and name, each row's figures, or what it `failed` of; until `end`, by the monotonic clock."""
    command = [sys.executable, "-m", "bench.gpu.row", rows, "--device", device]
    worker = Worker("figures", command, folder, {})
    told: Found = {}
    try:
        while worker.poll() and time.monotonic() < end:
            if (found := _found(worker)) != told:
                keep(told := found)
            time.sleep(0.3)
    finally:
        worker.stop()
    found = _found(worker)
    for name in worker.journal.read().left:
        _into(found, name, {"failed": worker.note or "out of time"})
    if worker.note:
        _into(found, f"figures{APART}all", {"failed": worker.note})
    keep(found)
    return found


def _found(worker: Worker) -> Found:
    found: Found = {}
    for name, row in worker.journal.read().ended.items():
        _into(found, name, {"failed": row["failed"]} if "failed" in row else row)
    return found


def _into(found: Found, name: str, row: dict[str, Any]) -> None:
    section, _, rest = name.partition(APART)
    found.setdefault(section, {})[rest] = row
