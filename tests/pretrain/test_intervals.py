"""Intervals by bootstrap, where they are known otherwise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastadv.pretrain.intervals import perplexity, ratio

DRAW = np.random.default_rng(1)
TOKENS = [50] * 200
LOSSES = (50 * (3 + 0.4 * DRAW.standard_normal(200))).tolist()  # of documents about as hard as each other


def test_documents_of_one_length() -> None:
    """Then it is the interval of a mean."""
    found = perplexity(LOSSES, TOKENS)
    means = np.array(LOSSES) / 50
    assert found.value == pytest.approx(math.exp(means.mean()))
    half = 1.96 * means.std() / math.sqrt(len(means))
    assert math.log(found.low) == pytest.approx(means.mean() - half, abs=0.15 * half)
    assert math.log(found.high) == pytest.approx(means.mean() + half, abs=0.15 * half)


def test_long_documents_count_for_their_tokens() -> None:
    assert perplexity([1.0, 30.0], [1, 10]).value == pytest.approx(math.exp(31 / 11))


def test_a_pair_is_known_better_than_either() -> None:
    first = {"losses": LOSSES, "tokens_each": TOKENS}
    worse = {"losses": [loss + 50 * 0.1 for loss in LOSSES], "tokens_each": TOKENS}
    assert ratio(first, first) == (1.0, 1.0, 1.0)
    found = ratio(first, worse)
    assert found == pytest.approx((math.exp(0.1),) * 3)
    noisy = {"losses": (np.array(LOSSES) + DRAW.standard_normal(200)).tolist(), "tokens_each": TOKENS}
    mine, theirs = ratio(first, noisy), perplexity(LOSSES, TOKENS)
    assert mine.low < 1 < mine.high
    assert mine.high / mine.low < theirs.high / theirs.low


def test_losses_beyond_all_numbers() -> None:
    assert perplexity([1e6, 1e6], [1, 1]).value == math.exp(700)
