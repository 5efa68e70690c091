"""Save a trained model: all of its files, or none that counts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fastadv.integrations import files
from fastadv.integrations.whole_checkpoints import UNFINISHED

LAST = "config.json"  # what makes a folder a model


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a model with its tokenizer in `folder`, beside its checkpoints. The files move there when all are written.

    `config.json` comes last, and a folder without it holds no model.
    """
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    files.sync_tree(unfinished)
    for file in sorted(unfinished.iterdir(), key=lambda one: one.name == LAST):
        if file.name == LAST:
            files.sync(folder)
        file.replace(folder / file.name)
    files.sync(folder)
    unfinished.rmdir()
