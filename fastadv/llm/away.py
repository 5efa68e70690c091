"""Make the target tokens unlikely."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastadv.llm.cutoff import limited
from fastadv.llm.scores import Scores

Form = Literal["log_1_minus_p", "cross_entropy"]


def away(
    scores: Scores,
    form: Form = "log_1_minus_p",
    *,
    threshold: float | None = -5.0,
    cutoff: float | None = None,
    leak: float = 0.001,
    jump: bool = False,
) -> Tensor:
    r"""A loss to be descended that makes the targets unlikely.

    .. math:: L = -\frac1N \sum_n \log(1 - p_n) \, [\log p_n \ge \text{threshold}], \qquad
        L_\text{cross entropy} = \frac1N \sum_n \log p_n

    "log_1_minus_p" is HarmBench's (R2D2, Mazeika et al. 2024, https://arxiv.org/abs/2402.04249),
    which LAT and CAT's option share: a token below the threshold has no gradient, and stays in N. log(1 - p) comes
    from the log-odds, -log(1 + e^s): exact for p near 1 and near 0, in every dtype, and no gradient by a logit exceeds
    1 / N. HarmBench subtracts 1e10 from a logit, which is -inf in float16.

    "cross_entropy" is CAT's unlikelihood loss (Xhonneux et al. 2024,
    https://arxiv.org/abs/2405.15589) and ER-CAT's.

    Args:
        scores: from `score`, on the harmful answer.
        form: which of the two.
        threshold: of "log_1_minus_p", a log-probability. None: every token counts.
        cutoff: of "cross_entropy", on the mean; see `limited`. CAT has -5 with `jump=True`, ER-CAT -3.
        leak: what is left of the gradient below the cutoff.
        jump: CAT's form of it.

    Returns:
        0-d, float32 (float64 for float64 logits).

    Raises:
        ValueError: another form, or a cutoff for "log_1_minus_p", which cannot fall below 0.

    Examples:
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])
        >>> away(Scores.of(logits, labels))  # -log(3 / 4)
        tensor(0.2877)
        >>> away(Scores.of(logits, labels), "cross_entropy", cutoff=-1.0)
        tensor(-1.0004)
    """
    if form == "cross_entropy":
        return limited(scores.log_probs.mean(), cutoff, leak, jump=jump)
    if form != "log_1_minus_p":
        raise ValueError(f"form must be 'log_1_minus_p' or 'cross_entropy', not {form!r}")
    if cutoff is not None:
        raise ValueError("cutoff is for form='cross_entropy': 'log_1_minus_p' has a threshold per token")
    odds = scores.log_odds
    losses = -F.logsigmoid(-odds)  # -log(1 - p)
    if threshold is not None:
        losses = torch.where(F.logsigmoid(odds) < threshold, 0, losses)
    return losses.mean()
