"""What is measured of each model of a run: the same documents, attacks and misspellings for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastadv.pretrain import intervals
from fastadv.pretrain.evaluate import IGNORED, Document, Evaluator, Losses
from fastadv.pretrain.noise import misspelt
from fastadv.pretrain.settings import Settings

MASKED = 0.15  # of a document's tokens, those that a masked model is asked for
CLEAN, ATTACK, NOISE = "clean", "attack", "noise"


class Special(NamedTuple):
    """Hold the numbers of a tokenizer's special tokens."""

    end: int
    padding: int
    mask: int | None


@dataclass(frozen=True)
class Texts:
    """Held-out documents, read by the tokenizer of the run, as they are and misspelt."""

    clean: list[Document]
    noisy: list[Document]
    causal: bool
    padding: int

    @staticmethod
    def read(texts: Sequence[str], encode: Callable[[str], list[int]], special: Special, settings: Settings) -> Texts:
        """Read texts: cut to a row, and for a masked model masked at places that follow from the seed.

        Args:
            texts: held-out documents.
            encode: makes a text's tokens, without special ones.
            special: the tokenizer's special tokens.
            settings: of the run.
        """
        causal = settings.objective == "causal"

        def document(text: str, number: int) -> Document:
            ids = [*encode(text), special.end][: settings.length]
            return Document(ids, ids) if causal else _masked(ids, special.mask, settings.seed, number)

        clean = [document(text, number) for number, text in enumerate(texts)]
        noisy = [
            document(misspelt(text, settings.noise_rate, settings.seed, number), number)
            for number, text in enumerate(texts)
        ]
        return Texts(clean, noisy, causal, special.padding)

    def part(self, rank: int, world: int) -> Texts:
        """Take the share of one of so many processes."""
        return Texts(self.clean[rank::world], self.noisy[rank::world], self.causal, self.padding)


def _masked(ids: list[int], mask: int | None, seed: int, number: int) -> Document:
    """Mask tokens of a document: one at least."""
    if mask is None:
        raise ValueError("the tokenizer has no mask token")
    generator = np.random.default_rng([seed, number])
    chosen = generator.random(len(ids)) < MASKED
    chosen[generator.integers(len(ids))] = True
    shown = [mask if one else token for one, token in zip(chosen, ids, strict=True)]
    return Document(shown, [token if one else IGNORED for one, token in zip(chosen, ids, strict=True)])


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
