r"""The Bregman proximal point, as SMART's paper has it.

.. math:: \text{gradient} = \nabla \Big( L(x; \theta) + w \, D\big(f(x; \theta), f(x; \bar\theta)\big) \Big), \qquad
          \bar\theta \leftarrow \beta \bar\theta + (1 - \beta) \theta

1. the teacher, a copy of the model, answers
2. backward through L(x) + w * D(f(x), its answer)
3. after the optimizer's step: the teacher's weights move towards the model's

Paper: Jiang et al. 2020, https://arxiv.org/abs/1911.03437. No public code has it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadv.reference.smart import symmetric_kl


class BregmanProximal:
    """The teacher is a second model."""

    def __init__(self, model: nn.Module, weight: float = 1.0, decay: float = 0.999) -> None:
        self.model, self.teacher = model, copy.deepcopy(model)
        self.weight, self.decay = weight, decay

    def step(self, forward: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """One training step's gradients, accumulated in `.grad`; returns the loss and the divergence.

        `forward(model)` runs a model on the batch and returns the loss and the logits.
        """
        with torch.no_grad():
            _, answer = forward(self.teacher)
        loss, logits = forward(self.model)
        distance = symmetric_kl(logits, answer)
        (loss + self.weight * distance).backward()  # type: ignore[no-untyped-call]
        return loss.detach(), distance.detach()

    @torch.no_grad()
    def update(self) -> None:
        """After the optimizer's step."""
        for mine, theirs in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            mine.mul_(self.decay).add_(theirs, alpha=1 - self.decay)
