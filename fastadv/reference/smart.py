r"""SMART on looked-up embeddings, as its paper has it.

.. math:: \text{gradient} = \nabla \Big( L(x) + w \, D\big(f(x + \delta_K), f(x)\big) \Big)

1. L(x) and f(x) forward; delta is the start
2. K times: g <- d D(f(x + delta), f(x)) / d delta, f(x) fixed;  delta <- clip(delta + alpha * g / max|g| per token)
3. backward through L(x) + w * D(f(x + delta), f(x)), both sides

D is the symmetric KL divergence, the mean over the batch. Paper: Jiang et al. 2020, https://arxiv.org/abs/1911.03437.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.reference.positions import perturbed


def symmetric_kl(logits: Tensor, target: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of two batches of logits."""
    log_p, log_q = F.log_softmax(logits, -1), F.log_softmax(target, -1)
    there = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return there + F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def smart(
    closure: Callable[[], tuple[Tensor, Tensor]],
    embedding: nn.Module,
    start: Tensor,
    *,
    epsilon: float = 0.005,
    step_size: float = 0.005,
    steps: int = 1,
    weight: float = 1.0,
    divergence: Callable[[Tensor, Tensor], Tensor] = symmetric_kl,
) -> tuple[Tensor, Tensor]:
    """One training step's gradients, accumulated in `.grad`; returns the loss and the divergence.

    `closure` returns the loss and the logits; `start` is [B, T, D].
    """
    loss, logits = closure()
    delta = start
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        with perturbed(embedding, delta):
            away = divergence(closure()[1], logits.detach())
        [grad] = torch.autograd.grad(away, delta)
        largest = grad.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        delta = (delta + step_size * grad / largest).clamp(-epsilon, epsilon)
    with perturbed(embedding, delta.detach()):
        penalty = divergence(closure()[1], logits)
    (loss + weight * penalty).backward()  # type: ignore[no-untyped-call]
    return loss.detach(), penalty.detach()
