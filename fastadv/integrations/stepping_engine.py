"""DeepSpeed as accelerate runs it: the backward that ends an optimizer step takes the step too."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fastadv.integrations.deepspeed import DeepSpeedOwner

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped, unused-ignore]

UNPREPARED = "accelerate makes DeepSpeed's engine in accelerator.prepare(model, optimizer): make the owner after that"


class SteppingEngine(DeepSpeedOwner):
    """Step the engine as `accelerator.backward` does, but after the last pass of a step and not after each.

    accelerate knows from `sync_gradients` (`accelerator.accumulate`, the Trainer) where an optimizer step ends, and its
    own `optimizer.step()` does nothing under DeepSpeed.

    Args:
        accelerator: the one that prepared the model.
        divides: see `DeepSpeedOwner`.

    Attributes:
        more: another `backward` of a method follows in this micro-batch, so that this one ends no step.

    Raises:
        ValueError: the accelerator has prepared no model yet.
    """

    steps = True

    def __init__(self, accelerator: Accelerator, *, divides: bool = True) -> None:
        wrapped = accelerator.deepspeed_engine_wrapped
        if wrapped is None:
            raise ValueError(UNPREPARED)
        super().__init__(wrapped.engine, divides=divides)
        self.more = False
        self._accelerator = accelerator
        self._hooks: dict[int, Callable[..., None]] = OrderedDict()

    def backward(self, loss: Tensor, last: bool) -> None:
        """`engine.backward`, and `engine.step` where the step ends."""
        super().backward(loss, last)
        if last and self._ends_a_step():
            self._engine.step()
            if self._engine.was_step_applied():  # not where float16 overflowed
                for hook in list(self._hooks.values()):
                    hook(self._engine, (), {})

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        """Call `hook` after every step, when weights are the new ones, as a torch optimizer does."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    def _ends_a_step(self) -> bool:
        return bool(self._accelerator.sync_gradients) and not self.more
