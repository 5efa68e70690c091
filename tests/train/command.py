"""The command, run inside the test's process and folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastadv.cli import main

FAST = ["--num-train-epochs", "3", "--learning-rate", "1e-3", "--radii", "0.2,0.1", "--attack-steps", "3"]


def train(encoder: Path, table: Path, folder: str, *more: str) -> Path:
    main_ok("train", "--model", str(encoder), "--data", str(table), "--output-dir", folder, *FAST, *more)
    return Path(folder)


def main_ok(*arguments: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code in (0, None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail with code 2, and write nothing."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before, "something was written"
    lines = error.splitlines()
    assert len(lines) == 1, error
    return lines[0]


def evaluated(folder: str) -> list[dict[str, Any]]:
    """The cells of an evaluation.json of one model."""
    (model,) = json.loads(Path(folder, "evaluation.json").read_text())["models"].values()
    cells: list[dict[str, Any]] = model["accuracy"]
    return cells
