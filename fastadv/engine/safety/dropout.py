"""Which dropout mask the passes of a step see: a fresh one each, the same one, or none."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastadv.engine.safety import rng

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
