"""Small texts, and a tokenizer and a corpus of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastadv.pretrain.corpus import Corpus
from fastadv.pretrain.settings import Settings
from fastadv.pretrain.source import Text

WORDS = [
    "the",
    "red",
    "fox",
    "ran",
    "over",
    "a",
    "hill",
    "and",
    "saw",
    "grey",
    "birds",
    "near",
    "water",
    "in",
    "spring",
]
SMALL = Settings(length=16, batch_tokens=16 * 8, micro_batch=3, vocab_size=300)


def sentences(count: int, seed: int = 0, most: int = 30) -> list[str]:
    """Texts of known words, of 1 to `most` of them."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, most))) for _ in range(count)]


def text(documents: Sequence[str]) -> Text:
    """A source of documents that are in memory."""
    return Text("these texts", f"texts {hash(tuple(documents))}", lambda: iter(documents))


def corpus(*documents: Sequence[int]) -> Corpus:
    """A corpus of documents of tokens."""
    flat = [token for document in documents for token in document]
    return Corpus(np.array(flat, np.uint16), np.cumsum([0, *map(len, documents)]))


def counted(*sizes: int) -> Corpus:
    """A corpus whose tokens are 0, 1, 2, ..., so that each tells where it comes from."""
    bounds = np.cumsum([0, *sizes])
    return Corpus(np.arange(bounds[-1], dtype=np.uint32), bounds)


def settings(folder: Path, documents: Sequence[str], **changed: Any) -> Settings:
    """Settings for a file of these documents, one on each line."""
    (folder / "text.txt").write_text("\n".join(documents), encoding="utf-8")
    return replace(SMALL, data=str(folder / "text.txt"), **changed)
