"""Small runs of the command, inside the test's process and folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from tests.train.command import main_ok

WORDS = ("the", "warm", "cold", "film", "story", "river", "town", "walks", "runs", "sees", "slowly", "with", "under")
TINY = ["--vocab-size", "300", "--length", "32", "--batch-tokens", "256", "--micro-batch", "4", "--eval-documents", "8"]
TINY += ["--attack-steps", "2", "--log-every", "2", "--save-every", "3", "--held-out", "0.1"]


def text(path: Path, count: int = 80) -> Path:
    """A file of documents, one a line."""
    draw = random.Random(0)
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(8, 30))) for _ in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def config(path: Path) -> Path:
    """A model of one layer and 16 dimensions, as a JSON file that `--model` takes."""
    small = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    path.write_text(json.dumps(small.to_dict()), encoding="utf-8")
    return path


def arguments(*more: str) -> list[str]:
    """Of a run that takes a second or two."""
    small = ["--data", str(text(Path("text.txt"))), "--model", str(config(Path("config.json")))]
    return ["pretrain", *small, *TINY, *more]


def pretrain(folder: str, *more: str) -> dict[str, Any]:
    """Run it, and read its result."""
    main_ok(*arguments("--output-dir", folder, *more))
    found: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    return found
