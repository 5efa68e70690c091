"""Misspellings."""

from __future__ import annotations

import itertools

import pytest

from fastadv.pretrain.noise import misspelt

TEXT = "Pretraining reads 4,096 tokens a step; the naïve ones, too. " * 50
LETTERS = sum(letter.isalpha() for letter in TEXT)


def test_no_noise_changes_nothing() -> None:
    assert misspelt(TEXT, 0.0, 0, 0) == TEXT


def test_letters_alone_are_changed() -> None:
    found = misspelt(TEXT, 1.0, 0, 0)
    assert found != TEXT
    assert [one for one in found if not one.isalpha()] == [one for one in TEXT if not one.isalpha()]


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_the_rate(rate: float) -> None:
    """Drops and repeats, a third each, change the number of letters either way; swaps leave it."""
    single = "x" * 20_000
    assert abs(len(misspelt(single, rate, 0, 0)) - len(single)) < 0.02 * len(single), "as many drops as repeats"
    numbered = "".join(chr(0x4E00 + index) for index in range(10_000))  # letters, each another one
    found = misspelt(numbered, rate, 0, 0)
    dropped = len(set(numbered) - set(found))
    repeated = sum(a == b for a, b in itertools.pairwise(found))
    swapped = sum(a > b for a, b in itertools.pairwise(found))
    for count in (dropped, repeated, swapped):
        assert 0.8 < count / (rate / 3 * len(numbered)) < 1.2


def test_it_follows_from_seed_and_number() -> None:
    assert misspelt(TEXT, 0.1, 3, 4) == misspelt(TEXT, 0.1, 3, 4)
    assert len({misspelt(TEXT, 0.1, seed, number) for seed in range(3) for number in range(3)}) == 9
