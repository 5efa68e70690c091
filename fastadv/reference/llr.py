r"""LLR on looked-up embeddings, as its paper has it.

.. math:: \text{gradient} = \nabla \Big( L(x) + \lambda \lvert L(x + \delta) - L(x) - \delta \cdot g \rvert
          + \mu \lvert \delta \cdot g \rvert \Big), \qquad g = \nabla_x L(x)

1. L(x) of each sample, and g with its graph; delta is the start
2. K times: delta <- clip(delta + alpha * sign of d |L(x + delta) - L(x) - delta . g| / d delta)
3. backward through all three terms, the mean over the samples; delta fixed, g not

Paper: Qin et al. 2019, https://arxiv.org/abs/1907.02610. The model needs second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadv.reference.positions import perturbed, sign_step


def llr(
    closure: Callable[[], Tensor],
    embedding: nn.Module,
    start: Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int = 3,
    gap_weight: float = 4.0,
    slope_weight: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """One training step's gradients, accumulated in `.grad`; returns the mean loss and the penalty.

    `closure` returns each sample's loss [B]; `start` is [B, T, D].
    """
    zero = torch.zeros_like(start).requires_grad_()
    with perturbed(embedding, zero):
        losses = closure()
    [slope] = torch.autograd.grad(losses.sum(), zero, create_graph=True)
    delta = start
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        with perturbed(embedding, delta):
            gaps = (closure() - losses.detach() - (delta * slope.detach()).flatten(1).sum(1)).abs()
        [grad] = torch.autograd.grad(gaps.sum(), delta)
        delta = sign_step(delta.detach(), grad, step_size, epsilon)
    with perturbed(embedding, delta):
        moved = closure()
    linear = (delta * slope).flatten(1).sum(1)
    penalty = gap_weight * (moved - losses - linear).abs().mean() + slope_weight * linear.abs().mean()
    (losses.mean() + penalty).backward()  # type: ignore[no-untyped-call]
    return losses.mean().detach(), penalty.detach()
