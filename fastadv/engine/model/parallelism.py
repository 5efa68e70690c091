"""Data parallelism, sharding and compilation: what each needs around a pass."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastadv.engine.model.find import is_compiled, is_cut
from fastadv.engine.model.flat import Flat
from fastadv.engine.model.placed import is_placed
from fastadv.engine.model.units import Units
from fastadv.engine.model.wrapper import wrapper_of
from fastadv.engine.safety.inventory import Inventory

UNREDUCED = (
    "the last pass of this step had no loss, or its weight is 0 (adv_weight?), so that the gradients of the earlier "
    "passes would never be reduced: give the last pass a loss and a weight above 0"
)
BYPASSED = (
    "the closure runs the model inside of its DistributedDataParallel, past the wrapper's forward, without which "
    "gradients are not reduced: call the wrapper in the closure, ddp_model(**batch). In Lightning set "
    "automatic_optimization = False and give the method backward=self.manual_backward"
)


class Parallelism:
    """The wrappers of one model, as they are when the method is made, and again where a step finds others.

    Args:
        inventory: of the model.
        communication: what FSDP2 sends between the passes of a step: "each", "last" or "keep".
        atomic: whether gradients that are there already are copied, to be put back on a fault.

    Attributes:
        compiled: the model, or a part of it, is.
        sharded: by FSDP2, FSDP1 or ZeRO-3.
        flat: what FSDP1 or ZeRO-3 has made of it.
        placed: weights are DTensors, as FSDP2 and tensor parallelism make them.
        talks: forwards send.
        units: FSDP2's.
        parallel: the DDP in the model or around it.

    Raises:
        ValueError: the model is under DistributedDataParallel with a static graph.
    """

    def __init__(self, inventory: Inventory, communication: str = "each", atomic: bool = True) -> None:
        self.inventory = inventory
        self.model = inventory.model
        self.compiled = self.sharded = self.placed = self.talks = False
        self.flat = Flat(self.model, [], [])
        self.parallel: DistributedDataParallel | None = None
        self.units = Units([], communication, atomic)
        self._new_units = functools.partial(Units, communication=communication, atomic=atomic)
        self._seen: tuple[object, object] = None, None
        self._around: DistributedDataParallel | None = None  # the DDP that holds a bare model
        self._sought = False  # it was looked for, which takes long
        self._deferred = False  # forwards prepare no reduction
        self._unreduced = False  # a full pass of this step has left gradients for a later one to reduce
        self._frozen: list[nn.Parameter] = []
        self.look()

    def look(self) -> bool:
        """Read the wrappers where they are others than before; whether they were."""
        inventory = self.inventory
        inventory.look()
        parameters = inventory.parameters if _is_grouped() else inventory.parameters[:1]
        found = inventory.compiled(), list(map(is_cut, parameters))
        holdings, before = self._seen
        if holdings is inventory.holdings and before == found:
            return False
        self._read()
        self._seen = inventory.holdings, found
        return True

    def _read(self) -> None:
        modules = self.inventory.modules
        self.compiled = is_compiled(self.model)
        self.units = self._new_units(modules)
        self.flat = Flat(self.model, modules, self.inventory.parameters)
        self.sharded = bool(self.units or self.flat)
        self.placed = any(map(is_placed, self.inventory.parameters))
        self.talks = self.sharded or any(isinstance(part, nn.SyncBatchNorm) for part in modules)
        inside = (part for part in modules if isinstance(part, DistributedDataParallel))
        self.parallel = next(inside, self._around)
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
            self.parallel = self._around = wrapper_of(self.model, DistributedDataParallel)
            self._check()
        return self.sharded or (self.parallel is not None and self.parallel.process_group.size() > 1)

    def processes(self) -> tuple[list[Any], list[int]]:
        """The groups in which the model's collectives run, and the ranks of all processes in them."""
        if self.parallel is not None:
            group = self.parallel.process_group
            return [group], dist.get_process_group_ranks(group)
        if not self.units:
            return self.flat.processes()
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

    def accumulates(self) -> bool:
        """Whether DDP leaves gradients to a later step to reduce: inside of the user's `no_sync`."""
        return self.parallel is not None and not self.parallel.require_backward_grad_sync

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
        self._unreduced, self._frozen = False, []
        self.units.begin()
        parallel, compiler = self.parallel, sys.modules.get("torch._dynamo.eval_frame") if self.compiled else None
        reduces = parallel is not None and parallel.require_backward_grad_sync
        stance = None if compiler is None else compiler._stance

        def put_back() -> None:
            if parallel is not None:
                parallel.require_backward_grad_sync = reduces
            if compiler is not None and compiler._stance is not stance:
                compiler._set_stance(stance)
            for parameter in self._frozen:
                parameter.requires_grad_(True)
            self.units.undo()

        return put_back

    def leave(self) -> None:
        """The step is over, done or undone."""
        self.units.end()

    # Around a pass. Where one fails, `remember` leads back.

    def synchronised(self, reduce: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a forward: gradients are reduced in the last full pass alone, and `prepare` may see to that."""
        if not reduce:
            self.units.hold()
        if self.parallel is not None:  # its forward makes a bool of this again
            self.parallel.require_forward_param_sync = int(self.parallel.require_forward_param_sync)  # type: ignore[assignment]
        if self.parallel is None or (reduce and not self._deferred):
            return contextlib.nullcontext()
        return _unreduced(self.parallel)

    def send(self, last: bool) -> None:
        """Before a full pass's backward, which reduces gradients if it is the last.

        Raises:
            RuntimeError: the closure has gone past DDP's forward.
        """
        self._unreduced = not last
        if not last:
            return
        self.units.send()
        if self.reduces_now() and self.among_others() and not self._ran_wrapper():
            raise RuntimeError(BYPASSED)

    def _ran_wrapper(self) -> bool:
        """Whether DDP's forward has run in the last full pass, or the whole step runs inside of it."""
        ddp: Any = self.parallel
        mute = getattr(ddp, "_use_python_reducer", False) or getattr(ddp, "_delay_all_reduce_all_params", False)
        return mute or isinstance(ddp.require_forward_param_sync, bool) or ddp._active_ddp_module is not None

    def check_reduced(self) -> None:
        """Raises RuntimeError if gradients of this step are left that no pass reduces."""
        if self._unreduced and (self.units.late or self.reduces_now()):
            raise RuntimeError(UNREDUCED)

    def prepare(self, loss: Tensor) -> None:
        """Let the backward of `loss` reduce gradients, as DDP does at the end of a forward.

        It would do so too early: where the forward is void, the next backward would reduce, whichever that is.
        """
        if self.parallel is not None and self._deferred:
            reducer = self.parallel.reducer
            reducer.prepare_for_forward()
            reducer.prepare_for_backward([loss] if self.parallel.find_unused_parameters else [])

    def average(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean of each over DDP's processes."""
        assert self.parallel is not None
        group = self.parallel.process_group
        means = [(tensor / group.size()).contiguous() for tensor in tensors]
        for work in [dist.all_reduce(mean, group=group, async_op=True) for mean in means]:
            work.wait()
        return means

    @contextlib.contextmanager
    def quiet(self, leaves: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """Around a pass that reduces nothing, and is about the gradients of `leaves` alone."""
        with self.synchronised(False), self.flat.quiet(), self.frozen(leaves):
            yield

    @contextlib.contextmanager
    def frozen(self, leaves: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        """A compiled backward computes every gradient it was compiled for: ask for none but those of `leaves`."""
        if not self.compiled:
            yield
            return
        wanted = {id(leaf) for leaf in leaves()}
        frozen = self._frozen = [p for p in self.model.parameters() if p.requires_grad and id(p) not in wanted]
        for parameter in frozen:
            parameter.requires_grad_(False)
        yield
        for parameter in frozen:
            parameter.requires_grad_(True)
        self._frozen = []
        self.units.thaw()

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
