"""Train adversarially with a DeepSpeed engine: ZeRO stages 1, 2 and 3."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastadv.engine.owner import Owner


class DeepSpeedOwner(Owner):
    """Hand losses to `engine.backward`, with the accumulation boundary at a step's last pass and nowhere else.

    DeepSpeed reduces gradients at the boundary and takes what an earlier backward left there for done. Its hooks wait
    for parameters' gradients in every backward: in probes they are quiet. Losses, and the terms of SMART, VAT and
    BregmanProximal, are divided by `gradient_accumulation_steps`: leave `share` as it is.

    Args:
        engine: as `deepspeed.initialize` returned it. `deepspeed` itself is not imported.
        divides: False: losses come divided by the micro-batches of their step, and `engine.backward` is told so
            (`scale_wrt_gas=False`).

    Examples:
        >>> from fastadv.integrations.deepspeed import DeepSpeedOwner
        >>> adv = fastadv.PGD(engine, backward=DeepSpeedOwner(engine))  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     adv.backward(lambda: engine(**batch).loss, mask=batch["attention_mask"])
        ...     engine.step()
    """

    def __init__(self, engine: Any, *, divides: bool = True) -> None:
        self._engine = engine
        self._divides = divides

    @property
    def divisor(self) -> float:  # type: ignore[override]
        """The micro-batches of an optimizer step, by which the engine divides; 1 where it does not."""
        return float(self._engine.gradient_accumulation_steps()) if self._divides else 1.0

    def backward(self, loss: Tensor, last: bool) -> None:  # noqa: ARG002
        """`engine.backward`."""
        with self._balanced():
            self._engine.backward(loss, scale_wrt_gas=self._divides)

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """A backward inside is the engine's own to its hooks, which then wait for nothing."""
        engine = self._engine
        before = engine._running_engine_backward
        engine._running_engine_backward = True
        try:
            with self._balanced(), self._unscaled():
                yield
        finally:
            engine._running_engine_backward = before

    @contextlib.contextmanager
    def _balanced(self) -> Iterator[None]:
        """Hooks at outputs enter a backward for each forward in it, and the engine leaves one, or none in a probe."""
        state = getattr(self._engine.optimizer, "_backward_hook_state", None)
        depth = getattr(state, "backward_active_depth", 0)
        try:
            yield
        finally:
            if state is not None:
                state.backward_active_depth = depth

    @contextlib.contextmanager
    def sync(self, last: bool) -> Iterator[None]:
        """The last pass of a micro-batch at the boundary is there; every other pass is before it."""
        engine = self._engine
        if not engine.managed_gradient_accumulation():  # `engine.step` is the boundary
            with self._unscaled():
                yield
            return
        before, there = engine._is_gradient_accumulation_boundary, self._ends_a_step()
        engine.set_gradient_accumulation_boundary(last and there)
        try:
            with self._unscaled():
                yield
        finally:
            engine.set_gradient_accumulation_boundary(there)
            engine._is_gradient_accumulation_boundary = before

    def _ends_a_step(self) -> bool:
        """Whether the optimizer steps after this micro-batch."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    @contextlib.contextmanager
    def _unscaled(self) -> Iterator[None]:
        """Hooks at the engine's outputs divide gradients of a backward that is not its own: LLR's slope, in a probe."""
        self._engine._backward_prologue_per_tensor = _as_it_is
        try:
            yield
        finally:
            del self._engine._backward_prologue_per_tensor


def _as_it_is(grad: Tensor) -> Tensor:
    return grad
