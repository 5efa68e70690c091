"""Adam's steps on a perturbation (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980), for the search of LLR."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS, GUARD = (0.9, 0.999), 1e-8


class Adam:
    """The moments of each call's gradient, over the ascents of one step."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._moments: dict[int, tuple[int, Tensor, Tensor]] = {}

    def begin(self) -> None:
        """A new search."""
        self._moments.clear()

    def step(self, call: int, grad: Tensor) -> Tensor:
        """How far to go up: rate * m / (sqrt(v) + 1e-8), with both moments unbiased."""
        count, first, second = self._moments.get(call, (0, torch.zeros_like(grad), torch.zeros_like(grad)))
        count += 1
        first = first.lerp(grad, 1 - BETAS[0])
        second = second.lerp(grad.square(), 1 - BETAS[1])
        self._moments[call] = count, first, second
        unbiased = first / (1 - BETAS[0] ** count), second / (1 - BETAS[1] ** count)
        return self.rate * unbiased[0] / (unbiased[1].sqrt() + GUARD)
