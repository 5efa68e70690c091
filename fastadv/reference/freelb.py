r"""FreeLB on looked-up embeddings, as its authors' code has it.

.. math:: \delta_{t+1} = \Pi\big(\delta_t + \alpha \, g_t / \|g_t\|\big), \qquad
          \text{gradient} = \frac{1}{K} \sum_{t=0}^{K-1} \nabla L(x + \delta_t)

1. delta is the start
2. for t in 0 .. K-1:
       loss / K forward and backward at delta: gradients accumulate
       if t < K-1: delta takes a step, per sample, and is projected

Paper: Zhu et al. 2020, https://arxiv.org/abs/1909.11764.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastadv.reference.positions import l2_step, max_step, perturbed


def freelb(
    closure: Callable[[], Tensor],
    embedding: nn.Module,
    start: Tensor,
    *,
    epsilon: float | None = None,
    step_size: float = 0.1,
    steps: int = 3,
    norm: str = "l2",
) -> list[Tensor]:
    """One training step's gradients, accumulated in `.grad`; returns the losses of the passes. `start` is [B, T, D]."""
    step = l2_step if norm == "l2" else max_step
    delta, losses = start, []
    for t in range(steps):
        delta = delta.detach().requires_grad_()
        with perturbed(embedding, delta):
            loss = closure()
            (loss / steps).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        if t < steps - 1 and delta.grad is not None:
            delta = step(delta.detach(), delta.grad, step_size, epsilon)
    return losses
