"""The difference of two models that were tested on the same samples, with its interval."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastadv.train.metrics import wilson

Correlation = tuple[float, float, float]  # with its interval


class Difference(NamedTuple):
    """Hold a difference, the second model's minus the first's, with its 95 % interval."""

    value: float
    low: float
    high: float
    samples: int


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference | None:
    """Compare two cells of result.json sample by sample. None: the cells do not say what each sample got."""
    for key, compare in (("right", _shares), ("predicted", _correlations)):
        if first.get(key) and len(first[key]) == len(second.get(key, ())):
            return compare(first, second)
    return None


def _shares(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    one, other = first["right"], second["right"]
    pairs = Counter(zip(one, other, strict=True))
    low, high = newcombe(pairs["1", "1"], pairs["0", "1"], pairs["1", "0"], pairs["0", "0"])
    return Difference((other.count("1") - one.count("1")) / len(one), low, high, len(one))


def _correlations(first: Mapping[str, Any], second: Mapping[str, Any]) -> Difference:
    one, other = ((cell["pearson"], cell["low"], cell["high"]) for cell in (first, second))
    between = statistics.correlation(first["predicted"], second["predicted"])
    low, high = zou(other, one, between)
    return Difference(other[0] - one[0], low, high, len(first["predicted"]))


def newcombe(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    r"""Compute the 95 % interval of the difference of two paired shares.

    Method 10 of Newcombe 1998 (Statistics in Medicine 17, 2635-2650): the Wilson intervals of both shares, combined by
    the correlation of the pairs, which is corrected for continuity. Of `both + gained` and `both + lost` successes:

    .. math:: \Delta - \sqrt{a^2 - 2 \varphi a b + b^2}, \quad a = p_1 - l_1, \quad b = u_2 - p_2

    and upwards with the other ends.
    """
    total = both + gained + lost + neither
    p, q = (both + gained) / total, (both + lost) / total
    (p_low, p_high), (q_low, q_high) = (wilson(both + count, total) for count in (gained, lost))
    phi = _correlation(both, gained, lost, neither)
    below = _combined(p - p_low, q_high - q, phi)
    above = _combined(p_high - p, q - q_low, phi)
    return max(-1.0, p - q - below), min(1.0, p - q + above)


def _combined(a: float, b: float, phi: float) -> float:
    return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))


def _correlation(both: int, gained: int, lost: int, neither: int) -> float:
    product = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    if product == 0:
        return 0.0
    agreement = float(both * neither - gained * lost)
    if agreement > 0:
        agreement = max(0.0, agreement - (both + gained + lost + neither) / 2)
    return agreement / math.sqrt(product)


def zou(one: Correlation, other: Correlation, between: float) -> tuple[float, float]:
    r"""Compute the 95 % interval of the difference of two correlations with the same numbers.

    Zou 2007 (Psychological Methods 12, 399-413), as in `newcombe` with Fisher's intervals of the two and

    .. math:: \varphi = \frac{(r_{12} - r_1 r_2 / 2)(1 - r_1^2 - r_2^2 - r_{12}^2) + r_{12}^3}{(1 - r_1^2)(1 - r_2^2)}

    Args:
        one: a correlation and the ends of its interval.
        other: the one that is taken off it.
        between: the correlation of what the two models predict.
    """
    (r, r_low, r_high), (q, q_low, q_high) = one, other
    scale = (1 - r * r) * (1 - q * q)
    joint = (between - r * q / 2) * (1 - r * r - q * q - between * between) + between**3
    phi = joint / scale if scale > 0 else 0.0
    below = _combined(r - r_low, q_high - q, phi)
    above = _combined(r_high - r, q - q_low, phi)
    return r - q - below, r - q + above
