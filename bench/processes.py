"""Figures that need a process of their own: peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from bench.peaks import CLEAR_REFS

ROOT = Path(__file__).parent.parent


def each(module: str, contestants: Iterable[str], *options: object) -> dict[str, dict[str, Any]]:
    """What `python -m module NAME options` prints, by name."""
    if not CLEAR_REFS.exists():
        pytest.skip("needs Linux: /proc/self/clear_refs resets the peak")
    return {name: _one([module, name, *map(str, options)]) for name in contestants}


def _one(arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
