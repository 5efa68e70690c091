"""Weights that are moved for a pass or two, and put back bit for bit in the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastadv.ops.ascend import l2_norm
from fastadv.ops.grads import Plan

SAFE = {torch.float32: 1e-15, torch.float64: 1e-130}  # of a norm whose squares have lost nothing that matters
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
        size, length = norm(grad), gamma * (norm(weight) + guard)
        self.skipped += (~size.isfinite()).to(self.skipped)
        live = size.isfinite() & (size > 0)
        if weight.is_cpu and not live.item():
            return torch.zeros_like(size)
        share = torch.where(live, length / torch.where(live, size + guard, 1), 0)
        _add(weight, grad if weight.is_cpu else torch.where(live, grad, 0), share)
        if epsilon is not None:
            reach = epsilon * saved.abs()
            torch.clamp(weight, saved - reach, saved + reach, out=weight)
        return share * torch.where(live, size, 0)


def _add(weight: Tensor, grad: Tensor, share: Tensor) -> None:
    """In place; in float32 at least, rounded once."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if weight.dtype == wide:
        weight.addcmul_(grad, share.to(wide))
    else:
        weight.copy_(torch.addcmul(weight.to(wide), grad.to(wide), share.to(wide)))


def norm(x: Tensor) -> Tensor:
    """The l2 norm of all of `x`, 0-d, for numbers of any size; on the CPU without memory for a scaled copy, mostly."""
    if x.is_cuda and x.dtype != torch.float64:  # its squares have room in float64
        on_device: Tensor = torch.linalg.vector_norm(x, dtype=torch.float64)
        return on_device
    plain: Tensor = torch.linalg.vector_norm(x)
    if x.is_cpu and x.dtype in SAFE and SAFE[x.dtype] < plain.item() < 1 / SAFE[x.dtype]:
        return plain.double()
    return l2_norm(x.to(torch.promote_types(x.dtype, torch.float32)).reshape(1, -1)).squeeze().double()
