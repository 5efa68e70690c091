"""A step leaves no trace when it fails: gradients, buffers, modes and generators are put back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine import rng


class _Gradient(NamedTuple):
    parameter: nn.Parameter
    grad: Tensor | None
    copy: Tensor | None


class _Buffer(NamedTuple):
    module: nn.Module
    name: str
    buffer: Tensor
    copy: Tensor


class _Constant(NamedTuple):
    buffer: Tensor
    version: int
    copy: Tensor


class _Saved(NamedTuple):
    gradients: list[_Gradient]
    buffers: list[_Buffer]
    modes: list[tuple[nn.Module, bool]]
    rng: rng.RngState


class Guard:
    """Restores a model if the block it guards raises anything, `KeyboardInterrupt` included.

    Where every `.grad` is None at entry, the usual case, gradients cost nothing: on a fault they are None again.
    Otherwise they are copied first, unless `atomic` is False.
    """

    def __init__(self, model: nn.Module, atomic: bool) -> None:
        self.model = model
        self.atomic = atomic
        self._constants: dict[int, _Constant] = {}

    @contextlib.contextmanager
    def __call__(self, device: torch.device) -> Iterator[None]:
        saved = self._save(device)
        try:
            yield
        except BaseException:
            self._restore(saved, device)
            raise

    def _save(self, device: torch.device) -> _Saved:
        modules = list(self.model.modules())
        return _Saved(
            [self._save_gradient(parameter) for parameter in self.model.parameters()],
            [
                _Buffer(module, name, buffer, self._copy(buffer))
                for module in modules
                for name, buffer in module._buffers.items()
                if buffer is not None
            ],
            [(module, module.training) for module in modules],
            rng.save(device),
        )

    def _save_gradient(self, parameter: nn.Parameter) -> _Gradient:
        grad = parameter.grad
        return _Gradient(parameter, grad, grad.clone() if grad is not None and self.atomic else None)

    def _copy(self, buffer: Tensor) -> Tensor:
        """A copy; kept from step to step for integer buffers (position ids, causal masks), whose version counter tells.

        Batch norm writes its running statistics without counting, so floating-point buffers are copied every time.
        """
        if buffer.is_floating_point():
            return buffer.clone()
        known = self._constants.get(id(buffer))
        if known is None or known.buffer is not buffer or known.version != buffer._version:
            known = self._constants[id(buffer)] = _Constant(buffer, buffer._version, buffer.clone())
        return known.copy

    @torch.no_grad()
    def _restore(self, saved: _Saved, device: torch.device) -> None:
        for parameter, grad, grad_copy in saved.gradients:
            parameter.grad = grad
            if grad is not None and grad_copy is not None:
                grad.copy_(grad_copy)
        for module, name, buffer, copy in saved.buffers:
            module._buffers[name] = buffer
            buffer.copy_(copy)
        for module, training in saved.modes:
            module.training = training
        rng.restore(saved.rng, device)
