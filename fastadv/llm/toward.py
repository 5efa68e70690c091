"""Make the target tokens likely."""

from __future__ import annotations

from torch import Tensor

from fastadv.llm.cutoff import limited
from fastadv.llm.scores import Scores


def toward(scores: Scores, *, cutoff: float | None = None, leak: float = 0.001, jump: bool = False) -> Tensor:
    r"""The mean cross-entropy of the targets, which makes them likely.

    .. math:: L = -\frac1N \sum_n \log p_n

    On a safe answer under the perturbation it is the "toward" of LAT (Sheshadri et al. 2024,
    https://arxiv.org/abs/2407.15549), CAT (Xhonneux et al. 2024,
    https://arxiv.org/abs/2405.15589) and R2D2; on benign text without a perturbation it is LAT's
    `sft` and CAT's utility loss. The mean is over all tokens of the batch: longer answers weigh more.

    Args:
        scores: from `score`.
        cutoff: see `limited`. CAT has 0.5 with `jump=True`, ER-CAT 1.
        leak: what is left of the gradient below the cutoff.
        jump: CAT's form of it.

    Returns:
        0-d, float32 (float64 for float64 logits).

    Examples:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])
        >>> toward(Scores.of(logits, labels))
        tensor(1.3863)
    """
    return limited(-scores.log_probs.mean(), cutoff, leak, jump=jump)
