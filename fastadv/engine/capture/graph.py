"""A whole step as one CUDA graph: one launch, in place of thousands that the host has to prepare.

Addresses are what a graph records. So a batch is copied to where the captured one was, gradients land where the
captured ones did, and the random numbers come from generators that the graph knows (`fastadv.engine.capture.streams`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from fastadv.engine.capture.recording import casts_apart, recording
from fastadv.engine.capture.streams import Streams
from fastadv.engine.safety import rng
from fastadv.engine.safety.guard import distinct

Step = Callable[[Any], Any]
Gradients = Sequence[tuple[nn.Parameter, Tensor]]  # each with the memory in which a graph leaves its gradient
WARM_UP = 3  # steps: allocations, compilations and a library's choices that a graph must not see

NOT_CAPTURED = (
    "capture(): the step does something that a CUDA graph cannot record, most often reading a number from the device "
    "(.item(), float(loss), a branch on a tensor, printing one). The error above says where"
)


class Schedule(Protocol):
    """What a capture must know of a method."""

    model: nn.Module

    def _enter(self, step: int | None = None) -> bool:
        """Go to the next step; whether it is attacked."""

    def _count(self, attacked: bool) -> None:
        """The step is done."""

    def _memory(self) -> list[Tensor]:
        """What outlives a step, and is written in it."""

    def _remember(self) -> Any:
        """Its state, for `rewind`."""

    def _rewind(self, state: Any) -> None:
        """Back to that state, in the same memory."""


class Captured:
    """`step(batch)` in place of `fn(batch)`; see `fastadv.Method.capture`."""

    def __init__(self, method: Schedule, fn: Step, example_batch: Any, device: torch.device) -> None:
        self._method, self._fn, self._device = method, fn, device
        self._inputs = Inputs(example_batch, device)
        self._graphs: dict[bool, Graph] = {}
        self._graph(method._enter())

    def __call__(self, batch: Any) -> Any:
        """One step on `batch`, which has the example's structure, shapes and dtypes.

        Returns what `fn` returned. Single numbers are the caller's; larger tensors are the graph's own, and the next
        step writes over them.
        """
        self._inputs.copy(batch)
        attacked = self._method._enter()
        result = self._graph(attacked).replay()
        self._method._count(attacked)
        return result

    def _graph(self, attacked: bool) -> Graph:
        """Attacked steps and plain ones are two graphs; each is captured when it is first wanted."""
        if attacked not in self._graphs:
            self._graphs[attacked] = Graph(self._method, lambda: self._fn(self._inputs.batch), self._device)
        return self._graphs[attacked]


class Inputs:
    """The memory that a captured step reads its batch from."""

    def __init__(self, example: Any, device: torch.device) -> None:
        leaves, self._spec = tree_flatten(example)
        self._leaves = [leaf.to(device, copy=True) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if not any(isinstance(leaf, Tensor) for leaf in leaves):
            raise TypeError("capture() needs a batch with tensors in it: a tensor, or a dict, tuple or list of them")
        self.batch = tree_unflatten(self._leaves, self._spec)

    def copy(self, batch: Any) -> None:
        """Take in another batch.

        Raises:
            ValueError: it is not like the captured one; nothing has been copied then.
        """
        leaves, spec = tree_flatten(batch)
        self._check(leaves, spec)
        for mine, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(leaf, non_blocking=True)

    def _check(self, leaves: list[Any], spec: TreeSpec) -> None:
        if spec != self._spec:
            raise ValueError(f"the batch has another structure than the captured one: {spec}, and not {self._spec}")
        for place, (mine, leaf) in enumerate(zip(self._leaves, leaves, strict=True)):
            if not isinstance(mine, Tensor):
                if leaf != mine:
                    raise ValueError(f"the captured batch had {mine!r} where this one has {leaf!r}: capture() again")
            elif not isinstance(leaf, Tensor) or leaf.shape != mine.shape or leaf.dtype != mine.dtype:
                raise ValueError(
                    f"tensor {place} of the batch is {_described(leaf)}, but the step was captured with "
                    f"{_described(mine)}: pad the batch to that shape, or capture() a step for this one as well"
                )


def _described(leaf: Any) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


class Graph:
    """One recorded step, and where it leaves its gradients."""

    def __init__(self, method: Schedule, run: Callable[[], Any], device: torch.device) -> None:
        self._streams = Streams(device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), _undone(method, device), rng.drawing_from(self._streams):
            self._warm_up(method, run, device)
            self._streams.make(self._graph.register_generator_state)
            self._output = self._capture(run, device)
            self._memory = method._memory()
            self._gradients = [(p, p.grad) for p in method.model.parameters() if p.grad is not None]

    def _warm_up(self, method: Schedule, run: Callable[[], Any], device: torch.device) -> None:
        state = method._remember()
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._streams.begin()
                with casts_apart():
                    run()
                method.model.zero_grad(set_to_none=True)
                method._rewind(state)
        torch.cuda.current_stream(device).wait_stream(side)

    def _capture(self, run: Callable[[], Any], device: torch.device) -> Any:
        """With no gradient there, so that the graph writes them and does not add to what is there."""
        self._streams.capturing = True
        self._streams.begin()
        try:
            with recording(self._graph, device):
                return run()
        except BaseException as error:
            self._streams.recover()
            if isinstance(error, RuntimeError) and "captur" in str(error):
                raise RuntimeError(NOT_CAPTURED) from error
            raise
        finally:
            self._streams.capturing = False

    def replay(self) -> Any:
        """The step, whose gradients are added to those that are there."""
        earlier = set_aside(self._gradients)
        self._streams.prepare(rng.new_seed)
        self._graph.replay()
        add(self._gradients, earlier)
        return tree_map(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) and leaf.numel() == 1 else leaf, self._output
        )


def set_aside(gradients: Gradients) -> list[tuple[Tensor, Tensor]]:
    """The gradients that are there before a replay, each behind the one of the graph's that it will be added to.

    What lies in the graph's own memory is copied, since the replay writes there.
    """
    there = [(mine, parameter.grad) for parameter, mine in gradients if parameter.grad is not None]
    return [(mine, grad.clone() if grad is mine else grad) for mine, grad in there]


def add(gradients: Gradients, earlier: list[tuple[Tensor, Tensor]]) -> None:
    """After a replay: add those to the graph's, which are the sum over the step's passes, and put these in place.

    A step without a graph adds its passes one by one to what is there: the same sum, rounded in another order.
    """
    if earlier:
        torch._foreach_add_([mine for mine, _ in earlier], [grad for _, grad in earlier])
    for parameter, mine in gradients:
        parameter.grad = mine


@contextlib.contextmanager
def _undone(method: Schedule, device: torch.device) -> Iterator[None]:
    """What warming up and capturing does to the model, the method and the generators is undone at the end."""
    model, state, generators = method.model, method._remember(), rng.save(device)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(distinct(buffer), distinct(buffer).clone()) for buffer in model.buffers()]
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for parameter, grad in gradients:
            parameter.grad = grad
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
        method._rewind(state)
        rng.restore(generators, device)
