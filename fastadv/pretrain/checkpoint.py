"""Checkpoints of a training: written behind its back, named when they are whole, and found again after a kill."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, cast

from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as read
from torch.distributed.checkpoint.state_dict_saver import async_save

from fastadv.integrations import files
from fastadv.jobs.json_file import write_json
from fastadv.pretrain import generators
from fastadv.pretrain.settings import PLAIN_ONLY
from fastadv.pretrain.step import Training

UNFINISHED = "unfinished"  # begins the name of one that is being written
STATE = "state.json"


class Found(NamedTuple):
    """A whole checkpoint, its state.json, and what is wrong with newer ones."""

    folder: Path | None
    state: dict[str, Any]
    passed_over: list[str]


class Saver:
    """Saves a training to a folder that all processes share, and keeps the newest checkpoints.

    What is saved is copied when `save` is called. It is written while the training goes on, to a folder that gets its
    name, `step-N`, when all of it is on the disk: a kill at any time leaves no other.

    Args:
        folder: of the checkpoints.
        training: what is saved.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, training: Training, keep: int) -> None:
        self._folder, self._training, self._keep = folder, training, keep
        self._writing: Future[Any] | None = None
        self._name = ""
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves for itself
        self._state: dict[str, Any] = {}

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Begin to save what `step` steps have led to; `state`: what can be written as JSON, the same everywhere."""
        self.finish()
        self._name = f"step-{step:08d}"
        method, world = name_of(self._training), self._training.processes.world
        self._state = {"step": step, "world": world, "method": method, **state}
        if self._training.processes.first:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._training.processes.wait()
        self._writing = _write(self._unfinished, self._training)

    def poll(self) -> None:
        """Give the last save its name, if it has come to its end."""
        if self._writing is not None and self._writing.done():
            self._settle()

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            Whatever writing raised: a full disk, for one.
        """
        self._settle()
        self._training.processes.wait()

    @property
    def _unfinished(self) -> Path:
        return self._folder / f"{UNFINISHED}-{self._name}"

    def _settle(self) -> None:
        writing, self._writing = self._writing, None
        if writing is None:
            return
        writing.result()
        if self._training.processes.first:
            publish(self._unfinished, self._folder / self._name, self._state)
            for old in sorted(whole_ones(self._folder))[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)


def publish(unfinished: Path, named: Path, state: Mapping[str, Any]) -> None:
    """Name a checkpoint all of whose files are written. Its state.json says how long each of them is."""
    sizes = {file.name: file.stat().st_size for file in unfinished.iterdir() if file.name != STATE}
    write_json(unfinished / STATE, {**state, "files": sizes})
    files.sync_tree(unfinished)
    if named.exists():  # damaged, or of a training that went back
        shutil.rmtree(named)
    unfinished.rename(named)
    files.sync(named.parent)


def newest(folder: Path) -> Found:
    """Find the newest checkpoint that is whole."""
    passed_over: list[str] = []
    for one in sorted(whole_ones(folder), reverse=True):
        flaw, state = _examine(one)
        if flaw is None:
            return Found(one, state, passed_over)
        passed_over.append(f"{one} is passed over: {flaw}")
    return Found(None, {}, passed_over)


def whole_ones(folder: Path) -> Iterator[Path]:
    """List the checkpoints that have their name."""
    return (one for one in folder.glob("step-*") if one.is_dir() and one.name[5:].isdecimal())


def clear(folder: Path) -> None:
    """Remove what saves have left that were killed; nobody may be saving there."""
    for one in folder.glob(f"{UNFINISHED}-*"):
        shutil.rmtree(one, ignore_errors=True)


def load(folder: Path, state: Mapping[str, Any], training: Training) -> bool:
    """Put back a training. Returns whether its generators were, which are those of as many processes."""
    content = _content(training)
    same = bool(state["world"] == training.processes.world)
    if not same:
        content.pop("generators")
    read(content, checkpoint_id=folder, no_dist=training.processes.world == 1)
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=content["model"],
        optim_state_dict=content["optimizer"],
    )
    if training.method is not None:
        training.method.load_state_dict(content["method"])
    if same:
        generators.restore(content["generators"][_mine(training)], training.processes.device)
    return same


def _write(folder: Path, training: Training) -> Future[Any]:
    """Copy a training to the CPU, and begin to write that; what the processes say of it goes through a group apart."""
    writing: Any = async_save(
        _content(training),
        checkpoint_id=folder,
        process_group=training.processes.saving,
        no_dist=training.processes.world == 1,
    )
    return cast("Future[Any]", writing)


def _content(training: Training) -> dict[str, Any]:
    """List the tensors of a checkpoint: each process has its generators, and its shards of the rest."""
    model, optimizer = get_state_dict(training.model, training.optimizer)
    return {
        "model": model,
        "optimizer": optimizer,
        "method": {} if training.method is None else training.method.state_dict(),
        "generators": {_mine(training): generators.save(training.processes.device)},
    }


def name_of(training: Training) -> str:
    """Name a training's method, or plain training."""
    return PLAIN_ONLY if training.method is None else type(training.method).__name__.lower()


def _mine(training: Training) -> str:
    return f"rank-{training.processes.rank}"


def _examine(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """Say why training cannot go on from a checkpoint, None where it can, and read its state.json."""
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        sizes = dict(state["files"])
    except FileNotFoundError:
        return f"it has no {STATE}", {}
    except (OSError, ValueError, TypeError, KeyError):
        return f"its {STATE} is cut off or damaged", {}
    for name, size in sizes.items():
        file = folder / name
        if not file.exists():
            return f"its {name} is missing", {}
        if file.stat().st_size != size:
            return f"its {name} is cut off or damaged", {}
    return None, state
