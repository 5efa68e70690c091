"""Data parallelism, sharding and compilation: what each needs around a pass."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastadv.engine.model.find import is_compiled


class Parallelism:
    """The wrappers of one model, as they are when the method is made.

    Raises:
        ValueError: the model is under DistributedDataParallel with a static graph.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.compiled = is_compiled(model)
        self.sharded = _is_sharded(model)
        self.parallel = next((part for part in model.modules() if isinstance(part, DistributedDataParallel)), None)
        if self.parallel is not None and self.parallel.static_graph:
            raise ValueError(
                "DistributedDataParallel(static_graph=True) expects the same backward in every pass, and the passes of "
                "a step differ: wrap the model without static_graph"
            )

    def reduces(self) -> bool:
        """Whether gradients are reduced over processes, by hooks that wait for each parameter's."""
        grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return grouped or self.parallel is not None

    def remember(self) -> Callable[[], None]:
        """Return what puts the wrappers' switches where they are now."""
        parallel, compiler = self.parallel, sys.modules.get("torch._dynamo.eval_frame") if self.compiled else None
        reduces = parallel is not None and parallel.require_backward_grad_sync
        stance = None if compiler is None else compiler._stance

        def put_back() -> None:
            if parallel is not None:
                parallel.require_backward_grad_sync = reduces
            if compiler is not None and compiler._stance is not stance:
                compiler._set_stance(stance)

        return put_back

    def synchronised(self, reduce: bool) -> contextlib.AbstractContextManager[Any]:
        """Under DDP, gradients are reduced in the last full pass alone."""
        if reduce or self.parallel is None:
            return contextlib.nullcontext()
        quiet: contextlib.AbstractContextManager[Any] = self.parallel.no_sync()
        return quiet

    @contextlib.contextmanager
    def quiet(self, leaves: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Around a pass that reduces nothing, and is about the gradients of `leaves` alone."""
        with self.synchronised(False), self.frozen(leaves):
            yield

    @contextlib.contextmanager
    def frozen(self, leaves: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """A compiled backward computes every gradient it was compiled for: ask for none but those of `leaves`."""
        if not self.compiled or self.parallel is not None:
            yield
            return
        wanted = {id(leaf) for leaf in leaves()}
        thawed = [p for p in self.model.parameters() if p.requires_grad and id(p) not in wanted]
        for parameter in thawed:
            parameter.requires_grad_(False)
        yield  # after a failure the step's frame thaws them
        for parameter in thawed:
            parameter.requires_grad_(True)

    def eagerly(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Run one pass of a compiled model eagerly."""
        if not (self.compiled and wanted):
            return contextlib.nullcontext()
        eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards `model` or a part of it."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
