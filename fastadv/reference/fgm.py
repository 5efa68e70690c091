r"""FGM on the embedding table, as the classic script has it.

.. math:: r = \epsilon \, G / \|G\|_F, \qquad \text{gradient} = \nabla L(E) + \nabla L(E + r)

1. forward and backward at E: gradients g, and G, the table's gradient
2. E <- E + epsilon * G / ||G||_F
3. forward and backward at E + r: its gradients are added to g
4. E <- E0

G is whatever lies in `weight.grad`: under gradient accumulation that is the sum over the earlier micro-batches too, as
in the script (Miyato et al. 2017, https://arxiv.org/abs/1605.07725, has one norm per sample and no accumulation).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class FGM:
    """`attack` moves the table, `restore` puts it back."""

    def __init__(self, embedding: nn.Embedding) -> None:
        self.weight = embedding.weight
        self.backup: Tensor | None = None

    def attack(self, epsilon: float = 1.0) -> None:
        """Move the table by `epsilon` along its gradient. No gradient, or one that is zero or NaN: it stays."""
        self.backup = self.weight.data.clone()
        grad = self.weight.grad
        if grad is None:
            return
        norm = torch.norm(grad)
        if norm != 0 and not torch.isnan(norm):
            self.weight.data.add_(epsilon * grad / norm)

    def restore(self) -> None:
        """Put the table back. Like the script, it swaps the storage and copies nothing."""
        if self.backup is None:
            raise RuntimeError("restore() without attack(): there is nothing to put back")
        self.weight.data = self.backup
        self.backup = None


def fgm(
    model: nn.Module, closure: Callable[[], Tensor], embedding: nn.Embedding, *, epsilon: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One training step's gradients, accumulated in `.grad`; returns the clean and the adversarial loss.

    `closure` runs the forward of `model` and returns its loss.
    """
    del model  # the same signature for every method; this one needs the table alone
    attacker = FGM(embedding)
    loss = closure()
    loss.backward()  # type: ignore[no-untyped-call]
    attacker.attack(epsilon)
    adv_loss = closure()
    adv_loss.backward()  # type: ignore[no-untyped-call]
    attacker.restore()
    return loss.detach(), adv_loss.detach()
