r"""FGSM on looked-up embeddings, and FGSM-RS, which starts at a random point.

.. math:: \delta = \mathrm{clip}_\epsilon\big(\delta_0 + \alpha \, \mathrm{sign}(\nabla_\delta L(x + \delta_0))\big),
          \qquad \text{gradient} = w \nabla L(x) + \nabla L(x + \delta)

1. clean pass, if w is not 0
2. the gradient at the start; one step along its sign; clip
3. forward and backward at the perturbation

Papers: Goodfellow et al. 2015, https://arxiv.org/abs/1412.6572; Wong et al. 2020, https://arxiv.org/abs/2001.03994.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadv.reference.positions import perturbed, sign_step


def fgsm(
    closure: Callable[[], Tensor],
    embedding: nn.Module,
    start: Tensor,
    *,
    epsilon: float,
    step_size: float,
    clean_weight: float = 1.0,
) -> Tensor:
    """One training step's gradients, accumulated in `.grad`; returns the adversarial loss. `start` is [B, T, D]."""
    if clean_weight:
        (clean_weight * closure()).backward()  # type: ignore[no-untyped-call]
    delta = start.clone().requires_grad_()
    with perturbed(embedding, delta):
        (grad,) = torch.autograd.grad(closure(), delta)
    delta = sign_step(delta.detach(), grad, step_size, epsilon)
    with perturbed(embedding, delta):
        loss = closure()
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
