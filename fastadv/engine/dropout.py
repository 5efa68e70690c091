"""Which dropout mask the passes of a step see: a fresh one each, the same one, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from fastadv.engine import rng

MODES = ("fresh", "same", "off")


class Dropout:
    """Holds the passes of a step to one mode."""

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self._replayed: rng.Replayed | None = None

    @contextlib.contextmanager
    def step(self, model: nn.Module) -> Iterator[None]:
        """One step; with "off", every module but those with running statistics is in eval mode."""
        self._replayed = None
        quiet = self._quieted(model) if self.mode == "off" else []
        for module in quiet:
            module.training = False
        try:
            yield
        finally:
            self._replayed = None
            for module in quiet:
                module.training = True

    def before_pass(self, device: torch.device) -> None:
        """With "same": replay the state that the step's first pass began with."""
        if self.mode != "same":
            return
        if self._replayed is None:
            self._replayed = rng.Replayed(device)
        else:
            self._replayed.again()

    @staticmethod
    def _quieted(model: nn.Module) -> list[nn.Module]:
        return [module for module in model.modules() if module.training and not isinstance(module, _NormBase)]
