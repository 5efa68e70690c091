"""Numbers by key, against Philox as its paper has it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fastadv.pretrain.keyed import Purpose, fractions, numbers

WORD = 2**64


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox-4x64-10 (Salmon et al. 2011), with Python's integers."""
    c, k = counter, key
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [b // WORD ^ c[1] ^ k[0], b % WORD, a // WORD ^ c[3] ^ k[1], a % WORD]
        k = [(k[0] + 0x9E3779B97F4A7C15) % WORD, (k[1] + 0xBB67AE8584CAA73B) % WORD]
    return c


@given(st.integers(0, WORD - 1), st.sampled_from(Purpose), st.integers(0, 2**56 - 1), st.integers(0, 9))
def test_numbers_are_philoxs_on_every_platform(seed: int, purpose: Purpose, which: int, count: int) -> None:
    expected = [one for step in (1, 2, 3) for one in philox([step, 0, 0, 0], [seed, purpose * 2**56 + which])]
    assert numbers(seed, purpose, which, count).tolist() == expected[:count]


def test_fractions_are_below_one() -> None:
    import numpy as np

    ends = np.array([0, 2**11 - 1, 2**11, 2**63, WORD - 1], np.uint64)
    assert fractions(ends).tolist() == [0.0, 0.0, 2.0**-53, 0.5, 1 - 2.0**-53]
