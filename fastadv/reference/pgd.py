r"""PGD on the embedding table, as the classic script has it.

.. math:: E_{t+1} = E_0 + \Pi_\epsilon\big(E_t + \alpha \, G_t / \|G_t\|_F - E_0\big), \qquad
          \text{gradient} = \nabla L(E_0) + \nabla L(E_K)

1. forward and backward at E_0; keep every gradient
2. for t in 0 .. K-1:
       r <- E + alpha * G / ||G||_F - E_0;  if ||r||_F > epsilon: r <- epsilon * r / ||r||_F;  E <- E_0 + r
       t < K-1: gradients <- 0;  t = K-1: gradients <- those of step 1
       forward and backward at E
3. E <- E_0

G is whatever lies in `weight.grad`, as in the script. Paper: Madry et al. 2018, https://arxiv.org/abs/1706.06083.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PGD:
    """`attack` moves the table one step, `restore` puts it back; the gradients have a backup of their own."""

    def __init__(self, model: nn.Module, embedding: nn.Embedding) -> None:
        self.model = model
        self.weight = embedding.weight
        self.table_backup: Tensor | None = None
        self.grad_backup: dict[str, Tensor] = {}

    def attack(self, epsilon: float = 1.0, alpha: float = 0.3, is_first_attack: bool = False) -> None:
        """Move the table by `alpha` along its gradient, then onto the ball of radius `epsilon` around its start."""
        if is_first_attack:
            self.table_backup = self.weight.data.clone()
        grad = self.weight.grad
        if grad is None:
            return
        norm = torch.norm(grad)
        if norm != 0 and not torch.isnan(norm):
            self.weight.data.add_(alpha * grad / norm)
            self.weight.data = self._project(self.weight.data, epsilon)

    def _project(self, table: Tensor, epsilon: float) -> Tensor:
        start = self._table_backup()
        r = table - start
        if torch.norm(r) > epsilon:
            r = epsilon * r / torch.norm(r)
        return start + r

    def restore(self) -> None:
        """Put the table back. Like the script, it swaps the storage and copies nothing."""
        self.weight.data = self._table_backup()
        self.table_backup = None

    def _table_backup(self) -> Tensor:
        if self.table_backup is None:
            raise RuntimeError("the first attack of a step must say is_first_attack=True")
        return self.table_backup

    def backup_grad(self) -> None:
        """Copy every gradient there is (the script fails where one is None)."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                self.grad_backup[name] = parameter.grad.clone()

    def restore_grad(self) -> None:
        """Put the copies back; a parameter that had no gradient has none again."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.grad = self.grad_backup.pop(name, None)


def pgd(
    model: nn.Module,
    closure: Callable[[], Tensor],
    embedding: nn.Embedding,
    *,
    epsilon: float = 1.0,
    step_size: float = 0.3,
    steps: int = 3,
) -> tuple[Tensor, list[Tensor]]:
    """One training step's gradients, accumulated in `.grad`; returns the clean loss and the `steps` adversarial ones.

    `closure` runs the forward of `model` and returns its loss.
    """
    attacker = PGD(model, embedding)
    loss = closure()
    loss.backward()  # type: ignore[no-untyped-call]
    attacker.backup_grad()
    adv_losses = []
    for t in range(steps):
        attacker.attack(epsilon, step_size, is_first_attack=t == 0)
        if t < steps - 1:
            model.zero_grad()
        else:
            attacker.restore_grad()
        adv_loss = closure()
        adv_loss.backward()  # type: ignore[no-untyped-call]
        adv_losses.append(adv_loss.detach())
    attacker.restore()
    return loss.detach(), adv_losses
