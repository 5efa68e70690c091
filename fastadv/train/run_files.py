"""What the folder of a run holds as JSON, read with its types checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from fastadv.jobs import typed
from fastadv.jobs.errors import UserError
from fastadv.jobs.json_file import read_json
from fastadv.train.job import Settings
from fastadv.train.sources import exists

ADVICE = "Train afresh, with another --output-dir"


class _Data(TypedDict):
    test_fingerprint: str


class _Begun(TypedDict):
    command: str
    settings: dict[str, Any]


class Begun(_Begun, total=False):
    """What settings.json holds."""

    data: _Data  # not in those of 0.1.0


class Chosen(TypedDict):
    """What radius.json holds."""

    method_arguments: dict[str, Any]
    radius: dict[str, Any] | None


class _Cost(TypedDict):
    steps: int
    seconds_per_step: float
    peak_memory: int
    device: str


class _Phase(TypedDict):
    phase: str
    cost: _Cost


class Phase(_Phase, total=False):
    """What phase.json holds."""

    warnings: list[str]
    accuracy: list[dict[str, Any]]
    only_answer: str | None


def begun(path: Path) -> Begun | None:
    """Read settings.json; None if there is none.

    Raises:
        UserError: it is damaged, or of another version.
    """
    saved = _json(path)
    if saved is None:
        return None
    found = typed.read(saved, Begun, path, ADVICE)
    settings_of(found["settings"], path)
    return found


def settings_of(saved: Any, path: object = "settings.json") -> Settings:
    """Make the settings of what settings.json holds of them.

    Raises:
        UserError: a key is unknown, or a value is of another type.
    """
    return typed.read(saved, Settings, path, ADVICE)


def _json(path: Path) -> Any:
    if exists(path) and not path.is_file():
        raise UserError(f"{path} is no file: remove it, or give another folder")
    return read_json(path, ADVICE)


def checked(path: Path, kind: Any) -> Any:
    """Read a file of `kind`, `Chosen` or `Phase`; None if there is none.

    Raises:
        UserError: it is damaged, or of another version.
    """
    saved = _json(path)
    return None if saved is None else typed.read(saved, kind, path, ADVICE)
