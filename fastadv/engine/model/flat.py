"""FSDP1 and ZeRO-3: weights are there while a module runs, as views of memory that is freed after it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from fastadv.engine.model.find import is_cut
from fastadv.engine.model.wrapper import wrapper_of


class Flat:
    """What FSDP1 or ZeRO-3 has made of a model; nothing where its weights are whole.

    Args:
        model: the model, in whose parts or around which the wrappers are.
        modules: its modules.
        parameters: its parameters.
    """

    def __init__(self, model: nn.Module, modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> None:
        self._found = any(map(is_cut, parameters))
        self._wrappers = list(_wrappers(model, modules)) if self._found else []

    def __bool__(self) -> bool:
        return self._found

    def processes(self) -> tuple[list[Any], list[int]]:
        """The groups in which FSDP1's collectives run, and the ranks of all processes in them."""
        outer = self._wrappers[0] if self._wrappers else None
        group = dist.group.WORLD if outer is None else outer.process_group
        nodes = getattr(outer, "_inter_node_pg", None)  # of a hybrid strategy, whose groups make up the world
        if nodes is not None:
            return [group, nodes], list(range(dist.get_world_size()))
        return [group], dist.get_process_group_ranks(group)

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Around a backward that brings no parameter's gradient: FSDP1 would take those that are there for its own.

        Reduced ones it would drop, and of others it would say that they were not reduced.
        """
        handles = [wrapper._handle for wrapper in self._wrappers if wrapper._handle is not None]
        states = [(one.flat_param, getattr(one.flat_param, "_post_backward_called", False)) for one in handles]
        for parameter, _ in states:
            parameter._post_backward_called = False
        flat = [one.flat_param for one in handles if not one._use_orig_params]
        kept = [(one, one.grad) for one in flat if one.grad is not None and one.grad.shape == one.shape]
        for parameter, _ in kept:
            parameter.grad = None
        yield
        for parameter, gradient in kept:
            parameter.grad = gradient
        for parameter, called in states:
            parameter._post_backward_called = called


def _wrappers(model: nn.Module, modules: Iterable[nn.Module]) -> Iterator[Any]:
    """FSDP1's, the outermost first."""
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FullyShardedDataParallel

    inside = [part for part in modules if isinstance(part, FullyShardedDataParallel)]
    outer = None if model in inside else wrapper_of(model, FullyShardedDataParallel)
    if outer is not None:
        yield outer
    yield from inside
