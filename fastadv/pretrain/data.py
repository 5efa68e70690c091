"""Everything that a pretraining reads, put together: text, tokenizer, tokens, rows and loader."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastadv.jobs.errors import UserError
from fastadv.jobs.shown import say
from fastadv.pretrain import text
from fastadv.pretrain.corpus import Corpus, load_or_write
from fastadv.pretrain.loader import Loader, Source, rows_per_step
from fastadv.pretrain.masking import Masking
from fastadv.pretrain.rows import Ints, Rows
from fastadv.pretrain.settings import Settings
from fastadv.pretrain.source import Text, clean
from fastadv.pretrain.stream import Stream, StreamRows
from fastadv.pretrain.tokenizer import encode, end_token, load_or_train

TOKENIZER, CORPUS, EVALUATION = "tokenizer", "corpus", "evaluation"


class Documents(NamedTuple):
    """Hold some documents of a corpus by their numbers, [documents] int64."""

    corpus: Corpus
    numbers: Ints

    @property
    def tokens(self) -> int:
        """The tokens of all of them."""
        return int(np.diff(self.corpus.bounds)[self.numbers].sum())


@dataclass(frozen=True)
class Data:
    """Hold what a pretraining reads.

    Attributes:
        tokenizer: of transformers.
        source: of the text.
        train: the documents to train on; None where the text is streamed.
        held_out: those to measure on; there may be none.
    """

    settings: Settings
    tokenizer: Any
    source: Text | Stream
    train: Documents | None
    held_out: Documents

    def loader(self, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> Loader:
        """Make a rank's loader, at the beginning.

        Raises:
            UserError: as `loader.rows_per_step`; the text is streamed and cannot be opened.
        """
        masking = Masking(self.tokenizer, self.settings.seed) if self.settings.objective == "masked" else None
        return Loader(self._rows(rank, world), self.settings, masking, rank=rank, world=world, device=device)

    def _rows(self, rank: int, world: int) -> Source:
        length, streams = self.settings.length, rows_per_step(self.settings, world)
        if isinstance(self.source, Text):
            assert self.train is not None
            return Rows(*self.train, length, self.settings.seed)
        return StreamRows(self.source, streams, range(rank, streams, world), self._encode, length)

    def _encode(self, document: str) -> list[int]:
        """Return a document's tokens with the end token; nothing of one without text."""
        found = encode(self.tokenizer, list(clean([document])))
        return [*found[0], end_token(self.tokenizer)] if found and found[0] else []


def prepare(settings: Settings, folder: Path, *, progress: bool = False) -> Data:
    """Find the text, train or load the tokenizer and tokenise, as far as the run's folder does not have it yet.

    One process calls this first; then the others may, and find everything done.

    Args:
        settings: of the run.
        folder: of the run.
        progress: say what was found, and show how far the tokenising is.

    Raises:
        UserError: as `text.find`, `tokenizer.load_or_train` and `corpus.load_or_write`; or there is nothing to
            measure a streamed training on.
    """
    if settings.streaming and settings.eval_data is None:
        raise UserError("a streamed text holds no documents out: say with --eval-data what to measure on")
    source = _source(settings)
    tokenizer = load_or_train(settings, source.documents, folder / TOKENIZER)
    measured = None
    if settings.eval_data is not None:
        found = text.find(settings.eval_data, settings.text_column)
        measured = _all(load_or_write(found, tokenizer, folder / EVALUATION, progress=progress))
    train = None
    if isinstance(source, Text):
        corpus = load_or_write(source, tokenizer, folder / CORPUS, progress=progress)
        train, rest = (Documents(corpus, one) for one in corpus.split(0 if measured else settings.held_out))
        measured = measured or rest
    assert measured is not None
    if progress:
        say(f"data: {source.what}", *_described(train, measured, settings))
    return Data(settings, tokenizer, source, train, measured)


def _source(settings: Settings) -> Text | Stream:
    return (text.stream if settings.streaming else text.find)(settings.data, settings.text_column)


def _all(corpus: Corpus) -> Documents:
    return Documents(corpus, np.arange(len(corpus)))


def _described(train: Documents | None, measured: Documents, settings: Settings) -> Iterator[str]:
    """Say how much text there is, and how often a training goes through it."""
    held_out = f"{len(measured.numbers):,} documents ({measured.tokens:,} tokens) to measure on"
    if train is None:
        yield f"  streamed; {held_out}"
        return
    passes = settings.max_steps * rows_per_step(settings) * settings.length / train.tokens
    yield f"  {len(train.numbers):,} documents ({train.tokens:,} tokens) to train on, {held_out}"
    yield f"  {settings.max_steps:,} steps go through it {passes:.2g} times"
