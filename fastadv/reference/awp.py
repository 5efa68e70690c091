r"""AWP on every matrix of a model, as its authors' code has it, but for the restore.

.. math:: v_l = \gamma \lVert w_l \rVert \frac{g_l}{\lVert g_l \rVert}, \qquad
          \text{gradient} = \nabla L(w) + \nabla L(w + v)

1. forward and backward at w
2. every matrix: w <- w + gamma * ||w|| * g / ||g||
3. forward and backward at w + v: gradients accumulate
4. w <- its copy (the authors' code subtracts v from the updated weight)

Paper: Wu et al. 2020, https://arxiv.org/abs/2004.05884.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def awp(model: nn.Module, closure: Callable[[], Tensor], *, gamma: float = 0.01) -> tuple[Tensor, Tensor]:
    """One training step's gradients, accumulated in `.grad`, which is empty before; returns both losses."""
    loss = closure()
    loss.backward()  # type: ignore[no-untyped-call]
    backup = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() > 1 and p.requires_grad}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in backup and p.grad is not None:
                p.add_(gamma * p.norm() * p.grad / (p.grad.norm() + 1e-20))
    adv_loss = closure()
    adv_loss.backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in backup:
                p.copy_(backup[name])
    return loss.detach(), adv_loss.detach()
