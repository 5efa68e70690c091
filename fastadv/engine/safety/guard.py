"""A step leaves no trace when it fails: gradients, buffers, modes and generators are put back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine.profile import span
from fastadv.engine.safety import rng
from fastadv.engine.safety.inventory import Inventory
from fastadv.ops.grads import Backup

GRADIENT = attrgetter("grad")


class _Constant(NamedTuple):
    buffer: Tensor
    version: int
    copy: Tensor


class _Saved(NamedTuple):
    """The inventory's lists as they were, and beside them what the model held."""

    parameters: list[nn.Parameter]
    gradients: list[Tensor | None]
    buffers: list[tuple[nn.Module, str, Tensor]]
    copies: list[Tensor]
    modules: list[nn.Module]
    modes: list[bool]
    rng: rng.RngState


class Guard:
    """Restores a model if the block it guards raises anything, `KeyboardInterrupt` included.

    Where every `.grad` is None at entry, the usual case, gradients cost nothing: on a fault they are None again.
    Otherwise they are copied first, unless `atomic` is False; the copies' memory serves until a step finds none again.
    A step that is captured runs unguarded.
    """

    def __init__(self, inventory: Inventory, atomic: bool, fused: bool | None) -> None:
        self.inventory = inventory
        self.atomic = atomic
        self.fused = fused
        self._backup: Backup | None = None
        self._constants: dict[int, _Constant] = {}

    @contextlib.contextmanager
    def __call__(self) -> Iterator[torch.device]:
        """Around a block; yields the model's device."""
        with span("guard"):
            self.inventory.look()
            device = self.inventory.device
            # While a step is captured nothing happens yet; what fails then is put back by who captures.
            saved = None if rng.capturing() else self._save(device)
        try:
            yield device
        except BaseException:
            if saved is not None:
                self._restore(saved, device)
            raise

    def _save(self, device: torch.device) -> _Saved:
        has = self.inventory
        gradients = list(map(GRADIENT, has.parameters))
        self._back_up([p for p, grad in zip(has.parameters, gradients, strict=True) if grad is not None])
        known, self._constants = self._constants, {}
        copies = [self._copy(buffer, known) for _, _, buffer in has.buffers]
        return _Saved(has.parameters, gradients, has.buffers, copies, has.modules, has.modes(), rng.save(device))

    def _back_up(self, parameters: list[nn.Parameter]) -> None:
        """Copy their gradients."""
        if not self.atomic or not parameters:
            self._backup = None
            return
        parameters = list(dict.fromkeys(parameters))
        if self._backup is None or not self._backup.is_of(parameters):
            self._backup = Backup(parameters, self.fused)
        self._backup.save()

    def _copy(self, buffer: Tensor, known: dict[int, _Constant]) -> Tensor:
        """A copy; of an integer buffer (position ids, causal masks), the last step's if its version has not moved.

        Batch norm writes its running statistics without counting, so floating-point buffers are copied every time.
        """
        if buffer.is_floating_point():
            return distinct(buffer).clone()
        constant = known.get(id(buffer))
        if constant is None or constant.buffer is not buffer or constant.version != buffer._version:
            constant = _Constant(buffer, buffer._version, distinct(buffer).clone())
        self._constants[id(buffer)] = constant
        return constant.copy

    @torch.no_grad()
    def _restore(self, saved: _Saved, device: torch.device) -> None:
        for parameter, grad in zip(saved.parameters, saved.gradients, strict=True):
            parameter.grad = grad
        if self._backup is not None:
            self._backup.restore()
        for (module, name, buffer), copy in zip(saved.buffers, saved.copies, strict=True):
            module._buffers[name] = buffer
            distinct(buffer).copy_(copy)
        for module, training in zip(saved.modules, saved.modes, strict=True):
            module.training = training
        rng.restore(saved.rng, device)


def distinct(buffer: Tensor) -> Tensor:
    """`buffer` without repetitions of the same memory: an expanded one cannot be copied to."""
    for dim, stride in enumerate(buffer.stride()):
        if stride == 0:
            buffer = buffer.narrow(dim, 0, min(1, buffer.shape[dim]))
    return buffer
