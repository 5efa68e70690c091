"""Keep finished trainings in a JSON file that several processes add to, and share the work among them."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypedDict

from fastadv.jobs import typed
from fastadv.jobs.errors import UserError
from fastadv.jobs.json_file import read_json, write_json
from fastadv.jobs.lock import lock
from fastadv.train.data import DataSettings
from fastadv.train.labels import CLASSIFICATION

ADVICE = "Remove it, or give another --output-dir"
Point = tuple[str, dict[str, Any]]


class Training(TypedDict):
    """What tells a finished training from another."""

    method: str
    arguments: dict[str, Any]
    seed: int


class File(TypedDict):
    """What the file holds."""

    command: str
    job: dict[str, Any]
    runs: list[Training]


class _Cell(TypedDict):
    radius: float


class Cell(_Cell, total=False):
    """A measure, as the tables read it."""

    metric: Literal["accuracy", "pearson"]
    accuracy: float
    pearson: float


class _Measured(Training):
    accuracy: list[Cell]
    seconds_per_step: float


class Measured(_Measured, total=False):
    """A finished training, as the tables read it."""

    peak_memory: float


class MeasuredFile(File):
    """A file that the tables can be made of."""

    runs: list[Measured]  # type: ignore[misc]


def check(path: Path) -> None:
    """Look whether tables can be made of the file, if there is one.

    Raises:
        UserError: they cannot. It says what is wrong.
    """
    saved = read_json(path)
    if saved is None:
        return
    runs = typed.read(saved, MeasuredFile, path, ADVICE)["runs"]
    widths = {tuple(cell["radius"] for cell in one["accuracy"]) for one in runs}
    whole = all(cell.get("metric", "accuracy") in cell for one in runs for cell in one["accuracy"])
    if len(widths) > 1 or () in widths or not whole:
        raise UserError(f"{path} is damaged: its trainings are not measured alike. {ADVICE}")


class Kept:
    """The trainings of one file, which all have `job` in common.

    Raises:
        UserError: the file is damaged, or holds trainings with other settings.
    """

    def __init__(self, path: Path, command: str, job: dict[str, Any]) -> None:
        self.path = path
        self.job = job
        self.fresh = {"command": command, "job": job, "runs": []}
        self.read()
        if not path.exists():
            self.update(lambda _: None)  # from now on another job is refused here

    def read(self) -> dict[str, Any]:
        """Read all that is finished, by whichever process."""
        saved = read_json(self.path)
        if saved is None:
            return {**self.fresh, "runs": []}
        result: Any = typed.read(saved, File, self.path, ADVICE)
        known = _as_of_now(result["job"])
        different = [name for name, value in _as_of_now(self.job).items() if known.get(name) != value]
        if different:
            raise UserError(
                f"{self.path} holds trainings with other settings ({', '.join(different)}): give another --output-dir"
            )
        return dict(result)

    def holds(self, point: Point, seed: int) -> bool:
        """Tell whether this training is finished."""
        return _in(self.read()["runs"], point, seed)

    def add(self, finished: dict[str, Any]) -> None:
        """Add a training to what is there by now; of two that are the same the first stays."""

        def change(result: dict[str, Any]) -> None:
            if not _in(result["runs"], (finished["method"], finished["arguments"]), finished["seed"]):
                result["runs"].append(finished)

        self.update(change)

    def update(self, change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Change the file while no other process does, and return what it holds then."""
        with lock(self.path.with_name(self.path.name + ".lock")):
            result = self.read()
            change(result)
            write_json(self.path, result)
        return result

    @contextmanager
    def claimed(self, point: Point, seed: int, *, wait: bool) -> Iterator[bool]:
        """Take a training on, so that no other process does; give False where one has."""
        named = json.dumps([*_plain(point), seed], sort_keys=True).encode()
        mark = hashlib.sha256(named).hexdigest()[:16]
        with lock(self.path.with_name(f"{self.path.name}.{mark}.lock"), wait=wait) as mine:
            yield mine

    def tidy(self) -> None:
        """Remove the marks of processes that were killed while they trained; what is held stays."""
        for mark in self.path.parent.glob(f"{glob.escape(self.path.name)}.*.lock"):
            with lock(mark, wait=False):
                pass


def _in(runs: list[dict[str, Any]], point: Point, seed: int) -> bool:
    wanted = (*_plain(point), seed)
    return any((one["method"], one["arguments"], one["seed"]) == wanted for one in runs)


def _plain(point: Point) -> tuple[str, dict[str, Any]]:
    name, arguments = point
    return name, as_read(arguments)


def as_read(value: Any) -> Any:
    """Convert to what `read_json` will return: a dtype comes back as its name."""
    return json.loads(json.dumps(value, default=str))


def _as_of_now(saved: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a file of an earlier version does not say, since there was no choice."""
    found, data = {"task": CLASSIFICATION, **saved}, saved.get("data")
    settings = data.get("settings") if isinstance(data, dict) else None
    if isinstance(settings, dict):
        found["data"] = {**saved["data"], "settings": {**asdict(DataSettings()), **settings}}
    return found
