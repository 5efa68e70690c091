"""Perplexities over documents, and the ratio of two models' on the same ones, with 95 % intervals by bootstrap."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
SEED = 0
Array = np.ndarray[Any, np.dtype[np.float64]]
TOO_LARGE = 700.0  # nats: beyond, exp overflows


class Interval(NamedTuple):
    """Hold a number with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def perplexity(losses: Sequence[float], tokens: Sequence[int]) -> Interval:
    r"""Compute the perplexity of documents, and its interval over other documents of their kind.

    .. math:: \exp\Big(\sum_d \ell_d \Big/ \sum_d n_d\Big)

    Whole documents are drawn again, since the tokens of one are not independent of each other (Efron 1979, Annals of
    Statistics 7, 1-26; percentiles of 2,000 resamples, drawn by a fixed seed).

    Args:
        losses: of each document, the sum over its tokens, in nats.
        tokens: of each, how many were predicted.

    Examples:
        >>> perplexity([2.0, 2.0], [1, 1])
        Interval(value=7.389056..., low=7.389056..., high=7.389056...)
    """
    return _exp(*_means(losses, tokens))


def ratio(first: Mapping[str, Any], second: Mapping[str, Any]) -> Interval:
    """Divide the second model's perplexity by the first's, on the same documents: both are drawn again together.

    Args:
        first: a cell of result.json, with `losses` and `tokens_each`.
        second: the other model's.
    """
    one, other = (_means(cell["losses"], cell["tokens_each"]) for cell in (first, second))
    return _exp(other[0] - one[0], other[1] - one[1])


def _means(losses: Sequence[float], tokens: Sequence[int]) -> tuple[float, Array]:
    """Compute the mean loss of a token: of these documents, and of each draw from them."""
    sums, counts = np.asarray(losses, np.float64), np.asarray(tokens, np.float64)
    drawn = _draws(len(sums))
    return float(sums.sum() / counts.sum()), (drawn @ sums) / np.maximum(drawn @ counts, 1)


@functools.lru_cache(maxsize=4)
def _draws(count: int) -> Array:
    """Count how often each of so many documents is in each draw: [draws, documents]."""
    generator = np.random.default_rng(SEED)
    return generator.multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(np.float64)


def _exp(value: float, drawn: Array) -> Interval:
    ends = np.percentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).all() else (value, math.inf)
    low, high = (math.exp(min(float(end), TOO_LARGE)) for end in ends)
    return Interval(math.exp(min(value, TOO_LARGE)), low, high)
