"""Weights that are moved for a pass or two, and put back bit for bit in the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastadv.ops.ascend import l2_norm
from fastadv.ops.grads import Plan

GUARD = 1e-6  # of the public code that clamps: on the weight's norm and on the gradient's


class MovedWeights:
    """The weights of a model that move, and where they were."""

    def __init__(self, weights: Sequence[nn.Parameter], fused: bool | None) -> None:
        self.weights = list(weights)
        self.saved = [torch.empty_like(weight, requires_grad=False) for weight in self.weights]
        lenient = False if fused is False else None
        self._save = Plan(self.saved, self.weights, lenient)
        self._restore = Plan(self.weights, self.saved, lenient)
        self.skipped = torch.zeros((), dtype=torch.int64, device=self.weights[0].device)
        self.norm = torch.zeros((), device=self.weights[0].device)  # of the last step's movements, the mean

    @contextlib.contextmanager
    def moving(self) -> Iterator[None]:
        """Inside, the weights may be moved; afterwards they are what they were, whatever has happened."""
        self._save.copy()
        try:
            yield
        finally:
            self._restore.copy()

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], gamma: float, epsilon: float | None) -> None:
        """Move each weight by gamma times its own norm along its gradient, then within epsilon |w| of each element.

        One without a gradient stays where it is; one whose gradient is not finite does too, and is counted.
        """
        norms = [self._move(index, grad, gamma, epsilon) for index, grad in enumerate(gradients) if grad is not None]
        if norms:
            self.norm.copy_(torch.stack(norms).mean())

    def _move(self, index: int, grad: Tensor, gamma: float, epsilon: float | None) -> Tensor:
        weight, saved = self.weights[index], self.saved[index]
        guard = 0.0 if epsilon is None else GUARD
        wide = torch.promote_types(weight.dtype, torch.float32)
        g, w = grad.to(wide), weight.to(wide)
        size = l2_norm(g.reshape(1, -1)).squeeze()
        finite = size.isfinite()
        self.skipped += (~finite).to(self.skipped)
        live = finite & (size > 0)
        length = gamma * (l2_norm(w.reshape(1, -1)).squeeze() + guard)
        share = torch.where(live, length / torch.where(live, size + guard, 1), 0)
        moved = torch.where(live, w + share * g, w)
        if epsilon is not None:
            reach = epsilon * saved.to(wide).abs()
            moved = torch.clamp(moved, saved - reach, saved + reach)
        weight.copy_(moved)
        return share * torch.where(live, size, 0)
