"""Data parallelism, sharding and compilation: what each needs around a pass."""

from __future__ import annotations

import contextlib
import gc
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
        self.talks = self.sharded or any(isinstance(part, nn.SyncBatchNorm) for part in model.modules())
        self.parallel = next((part for part in model.modules() if isinstance(part, DistributedDataParallel)), None)
        self._sought = False
        self._deferred = False  # forwards prepare no reduction
        self._check()

    def _check(self) -> None:
        if self.parallel is not None and self.parallel.static_graph:
            raise ValueError(
                "DistributedDataParallel(static_graph=True) expects the same backward in every pass, and the passes of "
                "a step differ: wrap the model without static_graph"
            )

    # Several processes

    def among_others(self) -> bool:
        """Whether other processes train this model too. Looks, once, for the DDP that a bare model was wrapped in."""
        if not _is_grouped():
            return False
        if self.parallel is None and not self.sharded and not self._sought:
            self._sought = True
            self.parallel = _wrapper_of(self.model)
            self._check()
        return self.sharded or (self.parallel is not None and self.parallel.process_group.size() > 1)

    def processes(self) -> tuple[list[Any], list[int]]:
        """The groups in which the model's collectives run, and the ranks of all processes in them."""
        if self.parallel is not None:
            group = self.parallel.process_group
            return [group], dist.get_process_group_ranks(group)
        from torch.distributed.tensor import DTensor

        mesh = next(p for p in self.model.parameters() if isinstance(p, DTensor)).device_mesh
        return mesh.get_all_groups(), mesh.mesh.flatten().tolist()

    def joins(self) -> bool:
        """Whether torch's `Join` is around: a process that has no more batches shadows what DDP does, and no more."""
        return self.parallel is not None and self.parallel._join_config.enable

    def reduces(self) -> bool:
        """Whether gradients are reduced over processes, by hooks that wait for each parameter's."""
        return _is_grouped() or self.parallel is not None

    def reduces_now(self) -> bool:
        """Whether DDP reduces in a backward whose forward runs now: not inside of the user's `no_sync`."""
        return self.parallel is not None and bool(self.parallel.require_backward_grad_sync)

    @contextlib.contextmanager
    def aligned(self, trains: bool) -> Iterator[None]:
        """Around a step, in whose forwards DDP then does nothing that another process would have to answer.

        Buffers are broadcast (and buckets put in order, once) at the step's begin, and what DDP prepares in a forward
        is left to `prepare`. Whether the step fails or not, the next broadcast is due where gradients were to be
        reduced: on every process the same, so that a step that fails keeps the buffers that it was sent.
        """
        ddp: Any = self.parallel
        if ddp is None or self.joins() or getattr(ddp, "_use_python_reducer", False):
            yield
            return
        if torch.is_grad_enabled():
            ddp.reducer._rebuild_buckets()
        if ddp.will_sync_module_buffers():
            ddp._sync_buffers()
        reduces = trains and self.reduces_now()
        ddp.require_forward_param_sync, self._deferred = False, reduces
        try:
            yield
        finally:
            ddp.require_forward_param_sync, self._deferred = reduces, False

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

    # Around a pass. Where one fails, `remember` leads back.

    def synchronised(self, reduce: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward: gradients are reduced in the last full pass alone, and `prepare` may see to that."""
        if self.parallel is None or (reduce and not self._deferred):
            return contextlib.nullcontext()
        return _unreduced(self.parallel)

    def prepare(self, loss: Tensor) -> None:
        """Let the backward of `loss` reduce gradients, as DDP does at the end of a forward.

        It would do so too early: where the forward is void, the next backward would reduce, whichever that is.
        """
        if self.parallel is not None and self._deferred:
            reducer = self.parallel.reducer
            reducer.prepare_for_forward()
            reducer.prepare_for_backward([loss] if self.parallel.find_unused_parameters else [])

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
        yield
        for parameter in thawed:
            parameter.requires_grad_(True)

    def eagerly(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        """Run one pass of a compiled model eagerly."""
        if not (self.compiled and wanted):
            return contextlib.nullcontext()
        eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return eager


@contextlib.contextmanager
def _unreduced(parallel: DistributedDataParallel) -> Iterator[None]:
    """DDP's `no_sync`, but that nothing follows an error: one that is dropped late would set the switch late."""
    before = parallel.require_backward_grad_sync
    parallel.require_backward_grad_sync = False
    yield
    parallel.require_backward_grad_sync = before


def _is_grouped() -> bool:
    """Whether there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """The only DDP that holds `model`; None where there is none, or more."""
    if any(issubclass(type(one), DistributedDataParallel) for one in gc.get_objects()):
        gc.collect()  # one that is no longer used may still be there
    wrappers = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    holding = [wrapper for wrapper in wrappers if any(part is model for part in wrapper.modules())]
    return holding[0] if len(holding) == 1 else None


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards `model` or a part of it."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())
