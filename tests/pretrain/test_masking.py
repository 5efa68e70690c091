"""What is hidden from a masked language model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fastadv.pretrain.masking import IGNORED, Masking

VOCABULARY, SPECIAL, MASK, MISSING = 1000, [0, 1, 7], 7, 400


class Tokenizer:
    """What `Masking` asks of one, whose vocabulary leaves out a number."""

    mask_token_id = MASK
    all_special_ids = SPECIAL

    def get_vocab(self) -> dict[str, int]:
        return {str(one): one for one in range(VOCABULARY) if one != MISSING}


def masked(ids: Sequence[int], row: int = 0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    return Masking(Tokenizer(), seed)(np.array(ids, np.int64), row)


@given(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=300), st.integers(0, 2**40), st.integers(0, 9))
def test_what_is_to_be_told_is_what_stood_there(ids: list[int], row: int, seed: int) -> None:
    shown, labels = masked(ids, row, seed)
    told = labels != IGNORED
    assert labels[told].tolist() == np.array(ids)[told].tolist()
    assert shown[~told].tolist() == np.array(ids)[~told].tolist()
    assert not np.isin(np.array(ids)[told], SPECIAL).any()
    assert shown.dtype == labels.dtype == np.int64
    again = masked(ids, row, seed)
    assert (shown.tolist(), labels.tolist()) == (again[0].tolist(), again[1].tolist())


def test_shares_are_those_of_the_paper() -> None:
    """Over 400,000 tokens, within five standard deviations."""
    ids = np.full(4000, 500)
    kept = [Masking(Tokenizer(), 3)(ids, row) for row in range(100)]
    shown, labels = (np.concatenate(columns) for columns in zip(*kept, strict=True))
    told = shown[labels != IGNORED]
    close(len(told), 0.15, len(shown))
    close((told == MASK).sum(), 0.8, len(told))
    close((told == 500).sum(), 0.1 + 0.1 / 996, len(told))
    others = told[(told != MASK) & (told != 500)]
    assert not np.isin(others, [*SPECIAL, MISSING]).any(), "no special token is put into a text, and nothing else"
    assert others.min() < 20 and others.max() > 980, "all of the vocabulary is drawn from"


def close(count: float, share: float, total: int) -> None:
    assert abs(count - share * total) < 5 * (total * share * (1 - share)) ** 0.5


def test_rows_and_seeds_have_masks_of_their_own() -> None:
    ids = list(range(10, 522))
    drawn = [masked(ids, row, seed)[1].tolist() for row, seed in ((0, 0), (1, 0), (0, 1))]
    assert len({tuple(one) for one in drawn}) == 3
