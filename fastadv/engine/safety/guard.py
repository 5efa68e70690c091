"""A step leaves no trace when it fails: what the model had is written down before, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine.safety import rng
from fastadv.engine.safety.inventory import Holding, Inventory
from fastadv.engine.safety.watched import GRADIENT
from fastadv.ops.grads import Backup, fit

TRAINED = attrgetter("requires_grad")


class Saved(NamedTuple):
    """The inventory's lists as they were, and beside them what the model held."""

    holdings: list[Holding]
    parameters: list[nn.Parameter]
    gradients: list[Tensor | None]
    trained: list[bool]
    buffers: list[Tensor]
    copies: list[Tensor]
    modules: list[nn.Module]
    modes: list[bool]
    generators: rng.RngState


class Guard:
    """Writes down a model before a step, and puts it back after one that failed, for whatever reason.

    Where every `.grad` is None at entry, the usual case, gradients cost nothing: on a fault they are None again.
    Otherwise they are copied first, unless `atomic` is False; the copies' memory serves until a step finds none again.
    """

    def __init__(self, inventory: Inventory, atomic: bool, fused: bool | None) -> None:
        self.inventory = inventory
        self.atomic = atomic
        self.fused = fused
        self._backup: Backup | None = None
        self._copies: list[Tensor] = []
        self._generators: rng.RngState | None = None

    def save(self) -> Saved:
        """Write down what the inventory lists."""
        has = self.inventory
        gradients = list(map(GRADIENT, has.parameters))
        self._back_up([p for p, grad in zip(has.parameters, gradients, strict=True) if grad is not None])
        buffers = [buffer for _, _, buffer in has.buffers]
        self._generators = rng.save(has.device)
        return Saved(
            has.holdings,
            has.parameters,
            gradients,
            list(map(TRAINED, has.parameters)),
            buffers,
            self._copied(buffers),
            has.modules,
            has.modes(),
            self._generators,
        )

    def _back_up(self, parameters: list[nn.Parameter]) -> None:
        """Copy their gradients."""
        if not self.atomic or not parameters:
            self._backup = None
            return
        parameters = list(dict.fromkeys(parameters))
        if self._backup is None or not self._backup.is_of(parameters):
            self._backup = Backup(parameters, self.fused)
        self._backup.save()

    def _copied(self, buffers: list[Tensor]) -> list[Tensor]:
        """Copies, in the memory of the last step's where they fit.

        Of all buffers, every time: what is written through `.data`, numpy or a kernel does not count as a version.
        """
        sources = [distinct(buffer) for buffer in buffers]
        if not fit(self._copies, sources):
            self._copies = [source.detach().clone() for source in sources]
        elif sources:
            torch._foreach_copy_(self._copies, sources)
        return self._copies

    def rewind(self) -> None:
        """Buffers and generators as they were when a step began, for a first pass that begins again."""
        _buffers([buffer for _, _, buffer in self.inventory.buffers], self._copies)
        if self._generators is not None:
            rng.restore(self._generators, self.inventory.device)

    def remember_buffers(self) -> Callable[[], None]:
        """Return what puts the buffers back where they are now."""
        buffers = [buffer for _, _, buffer in self.inventory.buffers]
        copies = [distinct(buffer).detach().clone() for buffer in buffers]
        return lambda: _buffers(buffers, copies)

    def put_back(self, saved: Saved) -> list[Callable[[], None]]:
        """Return what puts the model back: each part by itself, and as often as need be."""
        return [
            lambda: _hang(saved.holdings),
            lambda: _gradients(saved, self._backup),
            lambda: _buffers(saved.buffers, saved.copies),
            lambda: _flags(saved),
            lambda: rng.restore(saved.generators, self.inventory.device),
        ]


def _hang(holdings: Iterable[Holding]) -> None:
    """Give each module the children, parameters and buffers that it had, and no others."""
    for holding in holdings:
        holding.put_back()


@torch.no_grad()
def _gradients(saved: Saved, backup: Backup | None) -> None:
    for parameter, grad in zip(saved.parameters, saved.gradients, strict=True):
        if parameter.grad is not grad:  # FSDP1 keeps one of another shape, which could not be given again
            parameter.grad = grad
    if backup is not None:
        backup.restore()


@torch.no_grad()
def _buffers(buffers: list[Tensor], copies: list[Tensor]) -> None:
    for buffer, copy in zip(buffers, copies, strict=True):
        with torch.inference_mode(buffer.is_inference()):
            distinct(buffer).copy_(copy)


def _flags(saved: Saved) -> None:
    for parameter, trained in zip(saved.parameters, saved.trained, strict=True):
        if parameter.requires_grad != trained:
            parameter.requires_grad_(trained)
    for module, training in zip(saved.modules, saved.modes, strict=True):
        module.training = training


def distinct(buffer: Tensor) -> Tensor:
    """`buffer` without repetitions of the same memory: an expanded one cannot be copied to."""
    for dim, stride in enumerate(buffer.stride()):
        if stride == 0:
            buffer = buffer.narrow(dim, 0, min(1, buffer.shape[dim]))
    return buffer
