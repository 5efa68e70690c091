"""A perturbation of looked-up embeddings, and its steps per sample, as the public codes write them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def perturbed(embedding: nn.Module, delta: Tensor) -> Iterator[None]:
    """Inside, the embedding returns what it looked up, plus `delta`."""
    handle = embedding.register_forward_hook(lambda *call: call[-1] + delta)
    try:
        yield
    finally:
        handle.remove()


def l2_per_sample(x: Tensor) -> Tensor:
    """[B, 1, 1]: the norm of each sample's tokens and dimensions together."""
    norms: Tensor = torch.norm(x.flatten(1), dim=1)
    return norms.view(-1, 1, 1)


def l2_step(delta: Tensor, grad: Tensor, step_size: float, epsilon: float | None) -> Tensor:
    """Up the gradient of each sample by `step_size`, then each sample onto its ball."""
    delta = delta + step_size * grad / l2_per_sample(grad).clamp(min=1e-10)
    if epsilon is None:
        return delta
    norm = l2_per_sample(delta)
    return torch.where(norm > epsilon, delta * epsilon / norm, delta)


def max_step(delta: Tensor, grad: Tensor, step_size: float, epsilon: float | None) -> Tensor:
    """By the gradient over its largest element, per sample, then clipped."""
    delta = delta + step_size * grad / grad.abs().flatten(1).amax(1).view(-1, 1, 1).clamp(min=1e-10)
    return delta if epsilon is None else delta.clamp(-epsilon, epsilon)


def sign_step(delta: Tensor, grad: Tensor, step_size: float, epsilon: float | None) -> Tensor:
    """By the sign of the gradient, then clipped."""
    delta = delta + step_size * grad.sign()
    return delta if epsilon is None else delta.clamp(-epsilon, epsilon)
