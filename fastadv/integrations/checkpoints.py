"""Find the newest checkpoint that is whole, and say what is wrong with another."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE = "trainer_state.json"
DEEPSPEED = "global_step*"  # the folder of DeepSpeed's own files, which `latest` names
PARTS = {
    "optimizer": ("optimizer*", f"{DEEPSPEED}/*optim_states.pt"),
    "scheduler": ("scheduler.pt", f"{DEEPSPEED}/*model_states.pt"),  # DeepSpeed's own scheduler is in there
    "random state": ("rng_state*.pth",),
}
WEIGHTS = ("*model*.safetensors", "*model*.bin", "*fsdp*", "*model_states.pt")
PICKLES = (".pt", ".pth", ".bin")


class CheckpointError(ValueError):
    """Report that training cannot go on from a checkpoint, and what to do."""


class Choice(NamedTuple):
    """Hold the checkpoint to go on from, and why newer ones are passed over."""

    checkpoint: Path | None
    passed_over: list[str]


def newest(folder: Path, flaw: Callable[[Path], str | None]) -> Choice:
    """Choose the newest checkpoint of a folder that `flaw` finds nothing wrong with."""
    passed_over: list[str] = []
    for checkpoint in sorted(all_in(folder), key=number, reverse=True):
        wrong = flaw(checkpoint)
        if wrong is None:
            return Choice(checkpoint, passed_over)
        passed_over.append(f"{checkpoint} is passed over: {wrong}")
    return Choice(None, passed_over)


def all_in(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, whole or not."""
    found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return [path for path in found if path.is_dir() and path.name.rpartition("-")[2].isdecimal()]


def number(checkpoint: Path) -> int:
    """Read the optimizer step of a checkpoint from its name."""
    return int(checkpoint.name.rpartition("-")[2])


def flaw(checkpoint: Path) -> str | None:
    """Say why a Trainer cannot go on from a checkpoint; None where it can."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it has no {STATE}, so its save did not end"
    except (OSError, ValueError):
        state = None
    if not isinstance(state, dict):
        return f"its {STATE} is cut off or damaged"
    for file in sorted([*checkpoint.iterdir(), *checkpoint.glob(f"{DEEPSPEED}/*")]):
        if file.is_file() and _is_damaged(file):
            return f"its {file.name} is cut off or damaged"
    return _lacking(checkpoint)


def _lacking(checkpoint: Path) -> str | None:
    """Say what a checkpoint lacks of which it has a part."""
    if not any(any(checkpoint.rglob(name)) for name in WEIGHTS):
        return "it has no weights"
    if any(checkpoint.glob(DEEPSPEED)) and not _named_latest(checkpoint):
        return "its latest names no folder of DeepSpeed's"
    missing = [part for part, names in PARTS.items() if not any(any(checkpoint.glob(name)) for name in names)]
    if 0 < len(missing) < len(PARTS):  # none of them: save_only_model
        return f"its {missing[0]} is missing"
    return None


def _named_latest(checkpoint: Path) -> bool:
    try:
        return (checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()).is_dir()
    except OSError:
        return False


def _is_damaged(file: Path) -> bool:
    """Look at the part that says how long the file must be; contents are not read."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):  # type: ignore[no-untyped-call, unused-ignore]
                return False
        except (SafetensorError, OSError):
            return True
    if file.suffix in PICKLES:
        with file.open("rb") as opened:
            start = opened.read(2)
        return not start or (start == b"PK" and not zipfile.is_zipfile(file))
    return False
