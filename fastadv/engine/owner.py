"""Who runs the backward of a full pass: the loss itself, the user's function, or a gradient scaler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler

Backward = Callable[[Tensor], Any]


@dataclass
class Owner:
    """The owner of the backward.

    Args:
        function: takes a full pass's loss, `accelerator.backward` for example; None: `loss.backward()`.
        scaler: scales every loss, those of probes too.
        reads_gradients: whether `function` may look at gradients as soon as it has run. Then autograd brings all of
            them in every pass; otherwise the table's comes once, at the step's end.
    """

    function: Backward | None = None
    scaler: GradScaler | None = None
    reads_gradients: bool = False

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss of a pass that brings no parameter's gradient."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def backward(self, loss: Tensor) -> None:
        """Accumulate into `.grad`."""
        if self.function is not None:
            self.function(loss)
        else:
            self.scaled(loss).backward()  # type: ignore[no-untyped-call]
