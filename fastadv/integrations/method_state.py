"""A method's state in a checkpoint: which file, whose it is, and what can be wrong with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainingArguments

from fastadv.integrations import files
from fastadv.integrations.checkpoints import CheckpointError
from fastadv.methods import Method

AFRESH = "train on with that method, or afresh in another output_dir"


class State(NamedTuple):
    """Hold what a checkpoint says of a method: its tensors, and what else was noted."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def file_of(checkpoint: Path, args: TrainingArguments) -> Path:
    """Name the state's file: each process has its own part of every batch, and so its own state."""
    process = f"-{args.process_index}" if args.world_size > 1 else ""
    return checkpoint / f"adversary{process}.safetensors"


def kind(method: Method) -> str:
    """Name a method, and the one that it wraps."""
    inner = getattr(method, "method", None)
    return f"{type(method).__name__}({kind(inner) if isinstance(inner, Method) else ''})".removesuffix("()")


def save(method: Method, more: Mapping[str, Tensor], notes: Mapping[str, Any], file: Path) -> None:
    """Save a method's state, with `more` tensors and `notes` (JSON)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({**method.state_dict(), **more}, file, {"method": kind(method), "notes": json.dumps(notes)})
    files.sync(file)


def flaw(file: Path) -> str | None:
    """Say why a checkpoint's state cannot be loaded by this process; None where it can."""
    if file.exists():
        return None
    others = sorted(other.name for other in file.parent.glob("adversary*.safetensors"))
    saved = f"another number of processes saved it ({', '.join(others)})" if others else "a plain training saved it"
    return f"it has no {file.name}, the method's state: {saved}, or its save did not end"


def loaded(method: Method, checkpoint: Path | None, args: TrainingArguments) -> State | None:
    """Give a method the state that a checkpoint has of it; None where there is no checkpoint.

    Raises:
        CheckpointError: the file is damaged, or of another method.
    """
    if checkpoint is None:
        return None
    file = file_of(checkpoint, args)
    try:
        with safe_open(file, framework="pt") as opened:  # type: ignore[no-untyped-call, unused-ignore]
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): resume from an older checkpoint") from None
    mine, theirs = kind(method), metadata.get("method", kind(method))
    if mine != theirs:
        raise CheckpointError(f"{file} is the state of {theirs}, and this method is {mine}: {AFRESH}")
    try:
        method.load_state_dict(tensors)
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} is no state of {mine} ({error}): {AFRESH}") from None
    return State(tensors, json.loads(metadata.get("notes", "{}")))
