"""The paired interval: the paper's own table, and how often it covers the truth."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from fastadv.train.paired import difference, newcombe, zou

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


def fisher(r: float, samples: int) -> tuple[float, float, float]:
    middle, spread = np.arctanh(r), 1.959964 / np.sqrt(samples - 3)
    return r, float(np.tanh(middle - spread)), float(np.tanh(middle + spread))


def test_the_published_example_of_correlations() -> None:
    """Zou 2007, the overlapping case: r = 0.396 and 0.179, 0.088 between the two, 66 people."""
    assert zou(fisher(0.396, 66), fisher(0.179, 66), 0.088) == pytest.approx((-0.093, 0.517), abs=5e-4)


def test_coverage_of_correlations() -> None:
    """Two models that predict the same numbers with errors of their own: 2,000 test sets of 100."""
    generator = np.random.default_rng(0)
    covered = 0
    truth = 1 / np.sqrt(1.25) - 1 / np.sqrt(2)  # errors of deviation 0.5 and 1
    for _ in range(2000):
        target, *errors = generator.standard_normal((3, 100))
        one, other = target + 0.5 * errors[0], target + errors[1]
        r, q, between = (np.corrcoef(a, b)[0, 1] for a, b in ((one, target), (other, target), (one, other)))
        low, high = zou(fisher(r, 100), fisher(q, 100), between)
        covered += low <= truth <= high
    assert 0.935 < covered / 2000 < 0.97


def test_cells_of_numbers() -> None:
    one, other = np.arange(9.0), np.array([0, 2, 1, 3, 5, 4, 6, 8, 7.0])
    cells = [
        {"metric": "pearson", "pearson": r, "low": low, "high": high, "predicted": predicted.tolist()}
        for (r, low, high), predicted in ((fisher(0.6, 9), one), (fisher(0.8, 9), other))
    ]
    found = difference(*cells)
    assert found is not None
    assert found.value == pytest.approx(0.2)
    assert found.low < 0.2 < found.high
