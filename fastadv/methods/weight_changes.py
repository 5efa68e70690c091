"""Whether the parameters have been trained since: seen without reading them, which would wait for the device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook


class WeightChanges:
    """Counts what may have changed a model: steps of any optimizer, and writes that autograd counts.

    Both are needed: fused optimizers write past autograd's counters, and a hand-written update has no optimizer.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = 0
        self._handle = register_optimizer_step_post_hook(_counter(weakref.ref(self)))
        weakref.finalize(self, self._handle.remove)

    def count(self) -> int:
        """Another number than before, if the parameters may have changed."""
        return self.steps + sum(parameter._version for parameter in self.model.parameters())

    def close(self) -> None:
        """Stop counting."""
        self._handle.remove()


def _counter(changes: weakref.ref[WeightChanges]) -> Any:
    """The hook of all optimizers, which keeps nobody alive."""

    def count(*_: Any) -> None:
        mine = changes()
        if mine is not None:
            mine.steps += 1

    return count
