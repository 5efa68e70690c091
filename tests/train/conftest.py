"""A tiny encoder with its tokenizer, and small files of labelled texts."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertTokenizer

GOOD = ["fine", "bright", "warm", "lovely", "clever", "brisk"]
BAD = ["dull", "grey", "cold", "dreary", "clumsy", "slow"]
PLAIN = ["the", "a", "film", "story", "scene", "actor", "and", "with", "was", "is", "of", "in"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers and 32 dimensions, saved as a folder that `--model` takes."""
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def save_encoder(folder: Path) -> Path:
    """Save it with its tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PLAIN, *GOOD, *BAD]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of good or bad words among plain ones; no two alike."""
    generator = random.Random(seed)
    found: dict[str, str] = {}
    while len(found) < count:
        label, words = generator.choice([("good", GOOD), ("bad", BAD)])
        chosen = generator.choices(PLAIN, k=generator.randint(2, 12)) + generator.choices(words, k=2)
        generator.shuffle(chosen)
        found[" ".join(chosen)] = label
    return list(found.items())


def write_csv(path: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")) -> Path:
    """A CSV file of two columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """120 labelled texts as CSV."""
    return write_csv(tmp_path / "texts.csv", texts(120))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in a folder of its own, as one process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
