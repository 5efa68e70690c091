"""One file of results per GPU, to which both commands add, whole at every moment; and what is shown of it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import machine


def place(folder: Path, gpu: str | None) -> Path:
    return folder / f"{machine.slug(gpu or 'rehearsal')}.json"


def keep(path: Path, **sections: Any) -> None:
    """Put sections beside what is there: the other command's, and what `bench.report` keeps of the same GPU."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps({**before, **sections}, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)


def table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        print(f"  {name:44} {'  '.join(f'{key} {shown(value)}' for key, value in row.items())}", flush=True)


def shown(value: object) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {shown(one)}" for key, one in value.items()) + ")"
    return f"{value:,}" if isinstance(value, float) else str(value)
