"""Which dropout mask the passes of a step see: a fresh one each, the same one, or none."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastadv.engine.safety import rng
from fastadv.engine.safety.interrupts import whole

MODES = ("fresh", "same", "off")


class Draws:
    """The random numbers of one step's passes. With "same", every pass draws what the first one drew."""

    def __init__(self, mode: str, device: torch.device) -> None:
        self.same = mode == "same"
        self.device = device
        self._replayed: rng.Replayed | None = None

    def next_pass(self) -> None:
        """Another pass begins."""
        if not self.same:
            return
        if self._replayed is None:
            self._replayed = rng.Replayed(self.device)
        else:
            self._replayed.again()


def quieted(mode: str, modules: Iterable[nn.Module]) -> list[nn.Module]:
    """List what is in eval mode during a step: with "off", every module but those with running statistics."""
    return [one for one in modules if one.training and not isinstance(one, _NormBase)] if mode == "off" else []


class Evaluated:
    """Around a probe, or another forward: every module is as `model.eval()` leaves it, and then as it was.

    Args:
        inside: what else is around it.
        modules: of the model.
    """

    def __init__(self, inside: AbstractContextManager[Any], modules: Iterable[nn.Module]) -> None:
        self._inside = inside
        self._modules = modules
        self._trained: list[nn.Module] = []

    @whole
    def __enter__(self) -> None:
        self._trained = [module for module in self._modules if module.training]
        for module in self._trained:
            module.training = False
        self._inside.__enter__()

    @whole
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module in self._trained:
            module.training = True
        self._inside.__exit__(kind, error, trace)
