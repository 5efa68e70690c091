r"""NEFTune on looked-up embeddings, as its authors' training code has it.

.. math:: \delta_i \sim U(-1, 1) \cdot \alpha / \sqrt{L_i D}, \qquad \text{gradient} = \nabla L(x + \delta)

1. noise for every word that is no padding, by the sentence's true length
2. forward and backward at x + delta

Paper: Jain et al. 2024, https://arxiv.org/abs/2310.05914.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadv.reference.positions import perturbed


def noise(mask: Tensor, dimension: int, alpha: float = 5.0) -> Tensor:
    """[B, T, D] for a mask [B, T]."""
    uniform = 2 * torch.rand(*mask.shape, dimension) - 1
    size = alpha / torch.sqrt(mask.sum(1) * dimension)
    return uniform * mask.unsqueeze(-1) * size.view(-1, 1, 1)


def neftune(closure: Callable[[], Tensor], embedding: nn.Module, delta: Tensor) -> Tensor:
    """One training step's gradients, accumulated in `.grad`; returns the loss."""
    with perturbed(embedding, delta):
        loss = closure()
        loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()
