"""What is measured of each model of a run: the same documents, attacks and misspellings for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fastadv.jobs.errors import UserError
from fastadv.pretrain import intervals
from fastadv.pretrain.corpus import Corpus
from fastadv.pretrain.data import Data
from fastadv.pretrain.evaluate import Document, Evaluator, Losses
from fastadv.pretrain.masking import IGNORED, Masking
from fastadv.pretrain.noise import misspelt
from fastadv.pretrain.settings import Settings
from fastadv.pretrain.tokenizer import encode, end_token

SHORTEST = 2  # tokens: one, and the end
CLEAN, ATTACK, NOISE = "clean", "attack", "noise"


@dataclass(frozen=True)
class Texts:
    """Held-out documents as a model reads them, as they are and misspelt, cut to a row."""

    clean: list[Document]
    noisy: list[Document]
    causal: bool
    padding: int

    @staticmethod
    def read(corpus: Corpus, numbers: Sequence[int], tokenizer: Any, settings: Settings) -> Texts:
        """Read the documents of these numbers. A masked model's are corrupted as in training, by the seed.

        What is misspelt is what the tokens spell, so that no source is read again.
        """
        mask = Masking(tokenizer, settings.seed) if settings.objective == "masked" else None
        end = end_token(tokenizer)

        def document(tokens: ArrayLike, number: int) -> Document:
            ids = np.asarray(tokens, np.int64)[: settings.length]
            shown, labels = (ids, ids) if mask is None else mask(ids, number)
            return Document(shown.tolist(), labels.tolist())

        def noisy(number: int) -> list[int]:
            text = tokenizer.decode(corpus[number][:-1].tolist(), clean_up_tokenization_spaces=False)
            return [*encode(tokenizer, [misspelt(text, settings.noise_rate, settings.seed, number)])[0], end]

        return Texts(
            [document(corpus[number], number) for number in numbers],
            [document(noisy(number), number) for number in numbers],
            mask is None,
            end if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id),
        )

    def part(self, rank: int, world: int) -> Texts:
        """Take the share of one of so many processes."""
        return Texts(self.clean[rank::world], self.noisy[rank::world], self.causal, self.padding)


def measured_texts(data: Data) -> Texts:
    """Choose documents that are held out, evenly: neighbours are often about one thing. Those of one token are none.

    Raises:
        UserError: there is no document to measure on.
    """
    corpus, numbers = data.held_out
    usable = [int(one) for one in numbers if len(corpus[one]) > SHORTEST]
    if not usable:
        raise UserError("no document is held out to measure on: give more text, a larger --held-out or --eval-data")
    count = min(data.settings.eval_documents, len(usable))
    even = [usable[index * len(usable) // count] for index in range(count)]
    return Texts.read(corpus, even, data.tokenizer, data.settings)


def losses(model: Any, texts: Texts, settings: Settings, progress: bool = False) -> list[Losses]:
    """Compute the losses of documents: as they are, at each radius of the attack, and misspelt."""
    evaluator = Evaluator(model, causal=texts.causal, padding=texts.padding, progress=progress)
    clean = evaluator.losses(texts.clean)
    attacked = evaluator.attacked(texts.clean, clean, settings.radii, settings.attack_steps)
    return [clean, *attacked, evaluator.losses(texts.noisy, "misspelt")]


def cells(found: Sequence[Losses], texts: Texts, settings: Settings) -> list[dict[str, Any]]:
    """Make a cell of result.json of each measure: perplexity with its interval, and what it is computed from."""
    kinds = [(CLEAN, 0.0), *((ATTACK, radius) for radius in settings.radii), (NOISE, settings.noise_rate)]
    made = []
    for (kind, size), exact in zip(kinds, found, strict=True):
        sums = [round(one, 4) for one in exact]
        documents = texts.noisy if kind == NOISE else texts.clean
        tokens = [_predicted(one, texts.causal) for one in documents]
        value, low, high = intervals.perplexity(sums, tokens)
        made.append({
            "kind": kind,
            "size": size,
            "perplexity": value,
            "low": low,
            "high": high,
            "documents": len(documents),
            "losses": sums,
            "tokens_each": tokens,
        })  # fmt: skip
    return made


def _predicted(document: Document, causal: bool) -> int:
    """Count the tokens that are predicted: nothing comes before a causal model's first."""
    return sum(label != IGNORED for label in document.labels[causal:])
