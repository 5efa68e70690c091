"""Prefer the safe answer by a margin (IPO), as CAPO does under its attack."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.llm.scores import Scores


def ipo(
    chosen: Scores,
    rejected: Scores,
    base_chosen: Scores | Tensor,
    base_rejected: Scores | Tensor,
    *,
    beta: float = 0.25,
    threshold: float | None = None,
    jump: bool = False,
) -> Tensor:
    r"""The squared distance of the margin between two answers from 1 / (2 beta).

    .. math:: L = \frac1B \sum_b \left( (m_b(s) - m_b(h)) - (m^0_b(s) - m^0_b(h)) - \frac{1}{2\beta} \right)^2

    m is the mean log-probability of an answer's tokens, m^0 the base's. Gheshlaghi Azar et al. 2023,
    https://arxiv.org/abs/2310.12036; under CAT's attack it is CAPO (Xhonneux et al. 2024,
    https://arxiv.org/abs/2405.15589): both answers under the perturbation, the base without.

    Two defects of CAPO's code are left behind. Its base log-probabilities arrive in reverse order, so that every sample
    has another one's; here a pair is a row. And a token of the rejected answer that falls below the threshold counts
    0 there, at which the margin jumps by 5 / length; here it counts the threshold and has no gradient.

    Args:
        chosen: s, the safe answers, from `score`; one per pair, in order.
        rejected: h, the harmful ones.
        base_chosen: the base's, from `base_score`, or its `means()` [B].
        base_rejected: the same of h.
        beta: the larger, the smaller the margin.
        threshold: of a rejected token's log-probability; None: none. CAPO has -5.
        jump: CAPO's own rule at the threshold.

    Returns:
        0-d, float32 (float64 for float64 logits).

    Raises:
        ValueError: the numbers of samples differ, or a sample has no target.

    Examples:
        >>> labels = torch.tensor([[-100, 1, 2]])
        >>> safe = harmful = Scores.of(torch.zeros(1, 3, 4), labels)
        >>> ipo(safe, harmful, safe.means(), harmful.means())  # no margin yet: 2 squared
        tensor(4.)
    """
    log_probs = rejected.log_probs
    if threshold is not None:
        log_probs = torch.where(log_probs < threshold, 0.0 if jump else threshold, log_probs)
    means = rejected.targets.per_sample(log_probs) / rejected.targets.counts(log_probs)
    base = base_of(base_chosen, rejected, mean=True) - base_of(base_rejected, rejected, mean=True)
    margin = chosen.means() - means - base
    return (margin - 1 / (2 * beta)).square().mean()


def base_of(given: Scores | Tensor, like: Scores, *, mean: bool) -> Tensor:
    """The base's log-probabilities [B] of answers, without a gradient.

    Raises:
        ValueError: there is not one per sample.
    """
    if isinstance(given, Scores):
        given = given.means() if mean else given.totals()
    if given.shape != (like.targets.shape[0],):
        raise ValueError(
            f"the base's log-probabilities must be [{like.targets.shape[0]}], one per pair, not {tuple(given.shape)}"
        )
    return given.detach()
