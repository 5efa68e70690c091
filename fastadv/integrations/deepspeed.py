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

    Examples:
        >>> from fastadv.integrations.deepspeed import DeepSpeedOwner
        >>> adv = fastadv.PGD(engine, backward=DeepSpeedOwner(engine))  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     adv.backward(lambda: engine(**batch).loss, mask=batch["attention_mask"])
        ...     engine.step()
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    @property
    def divisor(self) -> float:  # type: ignore[override]
        """The micro-batches of an optimizer step."""
        return float(self._engine.gradient_accumulation_steps())

    def backward(self, loss: Tensor, last: bool) -> None:  # noqa: ARG002
        """`engine.backward`."""
        self._engine.backward(loss)

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """A backward inside is the engine's own to its hooks, which then wait for nothing."""
        engine = self._engine
        before = engine._running_engine_backward
        engine._running_engine_backward = True
        try:
            yield
        finally:
            engine._running_engine_backward = before

    @contextlib.contextmanager
    def sync(self, last: bool) -> Iterator[None]:
        """The last pass of a micro-batch at the boundary is there; every other pass is before it."""
        engine = self._engine
        if not engine.managed_gradient_accumulation():  # `engine.step` is the boundary
            yield
            return
        before, there = engine._is_gradient_accumulation_boundary, engine.is_gradient_accumulation_boundary()
        engine.set_gradient_accumulation_boundary(last and there)
        try:
            yield
        finally:
            engine.set_gradient_accumulation_boundary(there)
            engine._is_gradient_accumulation_boundary = before
