r"""VAT on looked-up embeddings, as its paper has it.

.. math:: \text{gradient} = \nabla L(x) + w \, \nabla \mathrm{KL}\big(f(x) \,\Vert\, f(x + r)\big)

1. f(x), a constant; r is a random direction at length xi
2. K times: g <- d KL(f(x) || f(x + r)) / d r;  r <- xi * g / |g|, per sample, the last time epsilon * g / |g|
3. backward through L(x) (where there are labels) + w * KL(f(x) || f(x + r))

Paper: Miyato et al. 2019, https://arxiv.org/abs/1704.03976.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.reference.positions import l2_per_sample, perturbed


def kl(logits: Tensor, target: Tensor) -> Tensor:
    """KL(target || logits), the mean over the batch."""
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(target, -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def vat(
    closure: Callable[[], tuple[Tensor | None, Tensor]],
    embedding: nn.Module,
    start: Tensor,
    *,
    epsilon: float = 1.0,
    xi: float = 0.1,
    steps: int = 1,
    weight: float = 1.0,
) -> Tensor:
    """One training step's gradients, accumulated in `.grad`; returns the divergence.

    `closure` returns the loss, or None for a batch without labels, and the logits; `start` is [B, T, D].
    """
    loss, logits = closure()
    answer, r = logits.detach(), start
    for left in reversed(range(steps)):
        r = r.detach().requires_grad_()
        with perturbed(embedding, r):
            away = kl(closure()[1], answer)
        [grad] = torch.autograd.grad(away, r)
        r = (xi if left else epsilon) * grad / l2_per_sample(grad)
    with perturbed(embedding, r):
        smooth = kl(closure()[1], answer)
    total = weight * smooth if loss is None else loss + weight * smooth
    total.backward()  # type: ignore[no-untyped-call]
    return smooth.detach()
