"""Misspell texts at a rate: letters swapped with their neighbour, dropped, or repeated."""

from __future__ import annotations

import numpy as np

SWAP, DROP, REPEAT = range(3)


def misspelt(text: str, rate: float, seed: int, number: int) -> str:
    """Change each letter with probability `rate`; which, and how, follows from the seed and the text's number alone.

    Each change is one of three, equally often: the letter changes places with the next one (where that is a letter
    too), is left out, or stands twice. Everything else stays: digits, spaces, punctuation.

    Args:
        text: any text.
        rate: the share of its letters that are changed.
        seed: of all texts.
        number: of this text among them.

    Examples:
        >>> misspelt("nothing is changed", 0.0, seed=0, number=0)
        'nothing is changed'
        >>> misspelt("a longer text to misspell", 0.2, seed=0, number=1) != "a longer text to misspell"
        True
    """
    generator = np.random.default_rng([seed, number])
    changed = generator.random(len(text)) < rate
    kinds = generator.integers(0, 3, len(text))
    found: list[str] = []
    place = 0
    while place < len(text):
        letter, after = text[place], text[place + 1 : place + 2]
        place += 1
        kind = kinds[place - 1] if letter.isalpha() and changed[place - 1] else None
        if kind == SWAP and after.isalpha():
            found.append(after + letter)
            place += 1
        elif kind == REPEAT:
            found.append(2 * letter)
        elif kind != DROP:
            found.append(letter)
    return "".join(found)
