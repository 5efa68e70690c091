"""The blocks of a model, and what is put around each: checkpointing, then the compiler, then FSDP2's sharding."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastadv.jobs.errors import UserError
from fastadv.pretrain.processes import Processes
from fastadv.pretrain.settings import Settings


def blocks(model: nn.Module) -> list[nn.Module]:
    """Find the model's layers: what transformers says must stay whole, or else its largest list of modules.

    Raises:
        UserError: the model has no list of modules.
    """
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part)]
    whole = set(getattr(model, "_no_split_modules", None) or ())
    found = [block for one in lists for block in one if type(block).__name__ in whole]
    if found:
        return found
    if not lists:
        raise UserError(f"{type(model).__name__} has no list of layers, by which it could be compiled or sharded")
    return max((list(one) for one in lists), key=_size)


def wrap(model: nn.Module, settings: Settings, processes: Processes) -> nn.Module:
    """Put the model on its device, and around its blocks what the settings ask for; in one process nothing is sharded.

    Raises:
        UserError: the model cannot be checkpointed.
    """
    model.to(processes.device)
    if settings.activation_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise UserError(f"{type(model).__name__} has no activation checkpointing: leave it out")
        _checkpoint(model)
    if settings.compile:
        for block in blocks(model):
            block.compile()
    if processes.world > 1:
        _shard(model, settings, processes)
    return model


def _checkpoint(model: Any) -> None:
    """By transformers' own, which knows what a block may keep: by its name, or the one that it had before."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _shard(model: nn.Module, settings: Settings, processes: Processes) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(processes.device.type, (processes.world,))
    low = torch.bfloat16 if settings.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=None if low is None else torch.float32)
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _size(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
