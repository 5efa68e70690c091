r"""YOPO on looked-up embeddings, split behind the first layer.

.. math:: p = \nabla_h L(h), \ h = f_0(x + \delta), \qquad
          \delta \leftarrow \Pi\big(\delta + \alpha \, g / \|g\|\big), \
          g = \nabla_\delta \langle p, f_0(x + \delta) \rangle \ \text{(n times)}, \qquad
          \text{gradient} = \frac{1}{m} \sum_j \nabla L(x + \delta_j)

1. delta is the start
2. for j in 0 .. m-1:
       loss / m forward and backward at delta: gradients accumulate; keep p, the gradient of the first layer's output
       if j < m-1: n times: run the first layer at delta, take a step up the gradient of <p, its output>, project

Here the whole model runs where the method needs the first layer alone. Papers: Zhang et al. 2019,
https://arxiv.org/abs/1905.00877; for text, Zhu et al. 2020, https://arxiv.org/abs/1909.11764.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastadv.reference.positions import l2_step, perturbed, sign_step


def yopo(
    closure: Callable[[], Tensor],
    embedding: nn.Module,
    first_layer: nn.Module,
    start: Tensor,
    *,
    epsilon: float | None = None,
    step_size: float = 0.1,
    steps: int = 3,
    inner_steps: int = 3,
    norm: str = "l2",
) -> list[Tensor]:
    """One training step's gradients, accumulated in `.grad`; returns the losses of the full passes."""
    step = l2_step if norm == "l2" else sign_step
    outputs: list[Tensor] = []
    handle = first_layer.register_forward_hook(lambda *call: outputs.append(_first(call[-1])))
    delta, losses = start, []
    for j in range(steps):
        delta = delta.detach().requires_grad_()
        outputs.clear()
        with perturbed(embedding, delta):
            loss = closure()
            outputs[0].retain_grad()
            (loss / steps).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        p = outputs[0].grad
        assert p is not None
        for _ in range(inner_steps if j < steps - 1 else 0):
            outputs.clear()
            delta = delta.detach().requires_grad_()
            with perturbed(embedding, delta):
                closure()
            (grad,) = torch.autograd.grad((outputs[0] * p).sum(), delta)
            delta = step(delta.detach(), grad, step_size, epsilon)
    handle.remove()
    return losses


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
