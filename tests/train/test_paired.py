"""The paired interval: the paper's own table, and how often it covers the truth."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from fastadv.train.paired import difference, newcombe

# Newcombe 1998, table III, method 10.
PUBLISHED = {
    (36, 12, 2, 0): (0.0569, 0.3404),
    (20, 12, 2, 16): (0.0562, 0.3292),
    (35, 14, 0, 1): (0.1461, 0.4175),
    (18, 14, 0, 18): (0.1441, 0.3963),
    (1, 97, 1, 1): (0.8736, 0.9850),
    (0, 30, 0, 0): (0.8395, 1.0),
    (54, 0, 0, 0): (-0.0664, 0.0664),
}


@pytest.mark.parametrize(("counts", "interval"), PUBLISHED.items())
def test_the_published_examples(counts: tuple[int, int, int, int], interval: tuple[float, float]) -> None:
    assert newcombe(*counts) == pytest.approx(interval, abs=1e-4)


@pytest.mark.parametrize("samples", [60, 500])
@pytest.mark.parametrize(
    "truth",
    [
        (0.48, 0.11, 0.05, 0.36),  # attacked models: +6 points
        (0.75, 0.05, 0.05, 0.15),  # clean accuracy: no difference
        (0.20, 0.02, 0.00, 0.78),  # nearly everything turned
    ],
)
def test_coverage(truth: tuple[float, ...], samples: int) -> None:
    """Of 4,000 test sets 95 % hold the true difference or more, by intervals that are hardly wider than needed."""
    tables = np.random.default_rng(0).multinomial(samples, truth, size=4000)
    interval = functools.cache(newcombe)
    bounds = np.array([interval(*map(int, table)) for table in tables])
    delta = truth[1] - truth[2]
    assert ((bounds[:, 0] <= delta) & (delta <= bounds[:, 1])).mean() > 0.94
    exact = 2 * 1.96 * np.sqrt((truth[1] + truth[2] - delta**2) / samples)
    assert (bounds[:, 1] - bounds[:, 0]).mean() < (1.75 if samples == 60 else 1.35) * exact


def test_pairs_know_more_than_two_samples() -> None:
    """Models that mostly agree: the interval is far narrower than without the pairs."""
    low, high = newcombe(250, 35, 15, 200)
    assert low > 0, "20 of 500 more"
    shuffled = newcombe(150, 135, 115, 100)  # the same shares, hardly correlated
    assert shuffled[1] - shuffled[0] > 1.5 * (high - low)


def test_cells_of_a_result() -> None:
    plain, adversarial = {"right": "1100" * 10}, {"right": "1110" * 10}
    found = difference(plain, adversarial)
    assert found is not None
    assert (found.value, found.samples) == (0.25, 40)
    assert (found.low, found.high) == newcombe(20, 10, 0, 10)
    assert difference({}, adversarial) is None, "as older versions wrote them"
    assert difference({"right": "10"}, adversarial) is None, "other samples"
