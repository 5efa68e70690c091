"""What a masked language model sees and what it must tell, by row."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastadv.pretrain.keyed import Purpose, fractions, numbers
from fastadv.pretrain.rows import Ints
from fastadv.pretrain.tokenizer import vocabulary_size

IGNORED = -100  # the label of a position that is not predicted, as everywhere in PyTorch
CHOSEN, MASKED, RANDOM = 0.15, 0.8, 0.1  # Devlin et al. 2019


class Masking:
    """Corrupt rows as BERT's pretraining does (Devlin et al. 2019).

    Of the tokens that are none of the tokenizer's special ones, 15 % are to be told: 80 % of these are replaced by the
    mask token, 10 % by another token of text, drawn evenly, and 10 % are left as they are. What is drawn follows from
    the seed and the row's number alone.

    Args:
        tokenizer: with a mask token.
        seed: of the draws.
    """

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.mask, self.seed = int(tokenizer.mask_token_id), seed
        self._special = np.zeros(vocabulary_size(tokenizer), dtype=bool)
        self._special[tokenizer.all_special_ids] = True
        tokens = np.array(sorted(tokenizer.get_vocab().values()))
        self._ordinary = tokens[~self._special[tokens]]

    def __call__(self, ids: Ints, row: int) -> tuple[Ints, Ints]:
        """Return a row's tokens as the model sees them, and its labels, both [T] int64; -100 is not to be told."""
        drawn = numbers(self.seed, Purpose.MASKING, row, 3 * len(ids)).reshape(3, len(ids))
        chosen = (fractions(drawn[0]) < CHOSEN) & ~self._special[ids]
        what = fractions(drawn[1])
        others = self._ordinary[drawn[2] % np.uint64(len(self._ordinary))]
        corrupted = np.where(what < MASKED, self.mask, np.where(what < MASKED + RANDOM, others, ids))
        return np.where(chosen, corrupted, ids), np.where(chosen, ids, IGNORED)
