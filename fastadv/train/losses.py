"""The loss of each task, as transformers computes it for a configuration's `problem_type`. Copied with the model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def losses(problem_type: str | None, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute the mean loss of a batch, and the loss of each sample [B], which LLR needs.

    Args:
        problem_type: None is that of one class each.
        logits: [B, C].
        labels: numbers of classes [B]; 1 or 0 per class [B, C]; or numbers to learn [B], with C = 1.

    .. math:: -\log p_y \qquad
        \frac1C \sum_c -t_c \log \sigma(y_c) - (1 - t_c) \log (1 - \sigma(y_c)) \qquad
        (y - t)^2
    """
    if problem_type == "multi_label_classification":
        each = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)
        return each.mean(), each
    if problem_type == "regression":
        each = F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype), reduction="none")
        return each.mean(), each
    return F.cross_entropy(logits, labels), F.cross_entropy(logits, labels, reduction="none")
