r"""FreeAT on looked-up embeddings, as the image code has it: one buffer by batch slot, which lives on across batches.

.. math:: \text{gradient} = \nabla L(x + \delta), \qquad \delta \leftarrow \mathrm{clip}_\epsilon\big(\delta + \alpha \,
          \mathrm{sign}(\nabla_\delta L)\big)

1. delta is zero
2. for every batch, m times:
       gradients <- 0; forward and backward at the first rows of delta
       those rows take a step along the sign of their gradient, and are clipped
       the optimizer steps

Paper: Shafahi et al. 2019, https://arxiv.org/abs/1904.12843.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadv.reference.positions import perturbed, sign_step


class FreeAT:
    """The buffer [rows, length, D], large enough for every batch."""

    def __init__(self, embedding: nn.Embedding, rows: int, length: int) -> None:
        self.embedding = embedding
        self.delta = embedding.weight.new_zeros(rows, length, embedding.embedding_dim).detach()

    def replay(
        self, closure: Callable[[], Tensor], rows: int, length: int, *, epsilon: float, step_size: float
    ) -> Tensor:
        """One replay's gradients, accumulated in `.grad`; returns its loss. The optimizer's step is the caller's."""
        delta = self.delta[:rows, :length].clone().requires_grad_()
        with perturbed(self.embedding, delta):
            loss = closure()
            loss.backward()  # type: ignore[no-untyped-call]
        if delta.grad is not None:
            with torch.no_grad():
                self.delta[:rows, :length] = sign_step(delta.detach(), delta.grad, step_size, epsilon)
        return loss.detach()
