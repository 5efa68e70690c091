"""AdamW, and what it does with a step's gradients: clipped as a whole, or left out as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.pretrain.settings import Settings


def adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """Make AdamW (Loshchilov and Hutter 2019). Weight decay is on matrices: not on norms, biases and embeddings."""
    spared = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decays = [parameter.dim() >= 2 and id(parameter) not in spared for parameter in trained]
    groups = [
        {"params": [p for p, one in zip(trained, decays, strict=True) if one is wanted], "weight_decay": decay}
        for wanted, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW([one for one in groups if one["params"]], settings.learning_rate, betas, fused=True)


def clip(optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """Scale gradients down to the norm `most`, over all parameters and processes; 0: leave them. Returns the norm, 0-d.

    Nothing waits for the device.
    """
    parameters = list(_parameters(optimizer))
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
    if most:
        nn.utils.clip_grads_with_norm_(parameters, most, norm, foreach=True)
    return whole(norm)


def update(optimizer: torch.optim.Optimizer, norm: Tensor, rate: float) -> None:
    """Take one step, unless the gradient's norm is not finite: then weights and moments stay as they are.

    The device decides, as it does for a GradScaler, and nothing waits for it.
    """
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = None, (~norm.isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded or has partial sums; one that is neither stays."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
