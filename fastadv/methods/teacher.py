"""A moving average of a model's weights, which answers batches in the model's place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastadv.engine.safety.inventory import Inventory
from fastadv.ops.grads import Plan, fit

OTHER_SHAPE = (
    "{name} was {was} when the teacher was made, and is {now}: resize the model first, and make the method after it"
)
PREFIX = "teacher."


class Teacher:
    """A copy of every parameter that requires a gradient, in its dtype, and of the buffers.

    Attributes:
        weights: by the parameters' names.
        buffers: by theirs.
        students: the parameters themselves.
    """

    def __init__(self, model: nn.Module, inventory: Inventory, fused: bool | None) -> None:
        self.model = model
        self.students: dict[str, nn.Parameter] = {}
        self.weights: dict[str, Tensor] = {}
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self._inventory = inventory
        self._known: list[nn.Parameter] = []
        self._plan = Plan([], [], False if fused is False else None)
        self._run = _Run(model)
        self.follow()

    def answer(self, closure: Callable[[], Any]) -> Any:
        """What the closure returns where its model has the teacher's weights, without a gradient."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}  # a forward may write to them
        with torch.no_grad():
            return functional_call(
                self._run, self._by_place({**self.weights, **buffers}), (closure,), tie_weights=False
            )

    def _by_place(self, mine: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The teacher's tensors, one for every place in the model that has a tensor of its.

        Two parts may share a tensor. One part that has two names (Fabric keeps a model and what wraps it) comes once:
        swapped by both, it would not be put back.
        """
        model = self.model
        of = {id(old): mine[name] for name, old in (*model.named_parameters(), *model.named_buffers()) if name in mine}
        places = (
            (f"{path}.{name}".lstrip("."), tensor)
            for path, part in self._run.named_modules()
            for name, tensor in _own(part)
        )
        return {place: of[id(tensor)] for place, tensor in places if id(tensor) in of}

    def average(self, decay: float) -> None:
        """Move towards the model: on the device, in one call, without synchronising."""
        self.follow()
        self._plan.average(decay)
        for name, buffer in self.model.named_buffers():
            if name in self.buffers:
                self.buffers[name].copy_(buffer)

    def copy(self) -> None:
        """Take the model's weights."""
        self._plan.copy()

    def follow(self) -> None:
        """Average the parameters that the model has now: in another precision, or others in their places.

        Raises:
            RuntimeError: one has another shape than before.
        """
        self._inventory.look()
        parameters = self._inventory.parameters
        same = len(self._known) == len(parameters) and all(map(is_, self._known, parameters))
        if same and fit(self.weights.values(), self.students.values()):
            return
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or name in self.students:
                self.students[name] = parameter
                self.weights[name] = _teacher_of(name, parameter, self.weights.get(name))
        self._plan.rebind(list(self.weights.values()), list(self.students.values()))
        self._known = parameters

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor, by name."""
        return {f"{PREFIX}{name}": tensor for name, tensor in (*self.weights.items(), *self.buffers.items())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        for name, tensor in (*self.weights.items(), *self.buffers.items()):
            tensor.copy_(state[PREFIX + name])


class _Run(nn.Module):
    """A module whose forward is a closure's, so that the model in the closure can be called with other weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, closure: Callable[[], Any]) -> Any:
        return closure()


def _own(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    tensors = (*part._parameters.items(), *part._buffers.items())
    return ((name, tensor) for name, tensor in tensors if tensor is not None)


def _teacher_of(name: str, parameter: nn.Parameter, before: Tensor | None) -> Tensor:
    """The teacher's tensor for a parameter: what it was, where that is and in its precision."""
    if before is None:
        return parameter.detach().clone()
    if before.shape != parameter.shape:
        raise RuntimeError(OTHER_SHAPE.format(name=name, was=tuple(before.shape), now=tuple(parameter.shape)))
    return before.to(parameter.device, parameter.dtype)
