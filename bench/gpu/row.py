"""`python -m bench.gpu.row MODULE:FUNCTION` goes through the rows that the function lists, and writes the journal."""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.journal import ERRORS, Journal, die_with


class Row(NamedTuple):
    """What finds a row's figures, and how many seconds it may take."""

    measure: Callable[[], dict[str, Any]]
    limit: float = 60.0


def go_through(listed: Mapping[str, Row], journal: Journal) -> int:
    """Those that have not begun yet. What else fails in a process after a failure is unknown: it ends there."""
    journal.plan(list(listed))
    for name, row in listed.items():
        if name in journal.read().begun:
            continue
        if torch := sys.modules.get("torch"):
            torch._dynamo.reset()
        gc.collect()
        journal.begin(name, row.limit)
        try:
            found = row.measure()
        except Exception as error:  # noqa: BLE001 - whatever it is, the others go on
            traceback.print_exc()
            journal.end(name, failed=f"{type(error).__name__}: {str(error)[:500]}")
            return 1
        journal.end(name, **found)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.row")
    parser.add_argument("rows")
    parser.add_argument("--device", required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--parent", type=int, required=True)
    options = parser.parse_args()
    faulthandler.enable(ERRORS)
    die_with(options.parent)
    module, _, function = options.rows.partition(":")
    listed: dict[str, Row] = getattr(importlib.import_module(module), function)(options.device)
    return go_through(listed, Journal(options.journal))


if __name__ == "__main__":
    sys.exit(main())
