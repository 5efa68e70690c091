"""Random numbers by key: the same for a row or an epoch wherever and whenever it is made."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """Keep numbers of one use apart from those of another with the same seed."""

    ORDER = 1  # of documents, by epoch
    HELD_OUT = 2  # documents
    MASKING = 3  # by row


def numbers(seed: int, purpose: Purpose, which: int, count: int) -> NDArray[np.uint64]:
    """Draw `count` numbers of 64 bits that are a function of the seed, the purpose and `which` alone.

    They are what Philox-4x64-10 gives for that key (Salmon et al. 2011), untouched by numpy's own distributions, which
    may change from one of its versions to the next.

    >>> numbers(0, Purpose.ORDER, 5, 2).tolist() == numbers(0, Purpose.ORDER, 5, 9).tolist()[:2]
    True
    """
    key = np.array([seed % 2**64, purpose << 56 | which], dtype=np.uint64)
    return np.random.Philox(key=key).random_raw(count)


def fractions(drawn: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Turn numbers of 64 bits into such from 0 to 1, 1 not included, in steps of 2**-53."""
    found: NDArray[np.float64] = (drawn >> np.uint64(11)) * 2.0**-53
    return found
