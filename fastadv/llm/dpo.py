"""Prefer one answer to another (DPO), as LAT does against backdoors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastadv.llm.ipo import base_of
from fastadv.llm.scores import Scores


def dpo(
    chosen: Scores,
    rejected: Scores,
    base_chosen: Scores | Tensor,
    base_rejected: Scores | Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Minus the log-probability that the chosen answer wins.

    .. math:: L = -\frac1B \sum_b \log \sigma\left(\beta \left( (l_b(s) - l_b(h)) - (l^0_b(s) - l^0_b(h)) \right)\right)

    l is the summed log-probability of an answer's tokens, l^0 the base's. Rafailov et al. 2023,
    https://arxiv.org/abs/2305.18290. LAT's backdoor runs have beta 0.3; its attack descends the
    same with the answers exchanged (Sheshadri et al. 2024, https://arxiv.org/abs/2407.15549).

    Args:
        chosen: s, from `score`; one answer per pair, in order.
        rejected: h.
        base_chosen: the base's, from `base_score`, or its `totals()` [B].
        base_rejected: the same of h.
        beta: how much a log-probability counts.
        label_smoothing: the share of pairs taken to be the other way round.

    Returns:
        0-d, float32 (float64 for float64 logits).

    Raises:
        ValueError: the numbers of samples differ, or a sample has no target.

    Examples:
        >>> import torch
        >>> labels = torch.tensor([[-100, 1, 2]])
        >>> safe = harmful = Scores.of(torch.zeros(1, 3, 4), labels)
        >>> dpo(safe, harmful, safe.totals(), harmful.totals())
        tensor(0.6931)
    """
    base = base_of(base_chosen, rejected, mean=False) - base_of(base_rejected, rejected, mean=False)
    margin = beta * (chosen.totals() - rejected.totals() - base)
    losses = (1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return -losses.mean()
