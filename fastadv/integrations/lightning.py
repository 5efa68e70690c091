"""Train adversarially with Lightning: a LightningModule under manual optimisation, or a loop with Fabric."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from fastadv.engine.owner import Owner

AUTOMATIC = (
    "{name} is under automatic optimisation, where Lightning runs one backward a step, after training_step. A step of "
    "fastadv has several: set self.automatic_optimization = False in __init__, and in training_step call "
    "self.adv.backward(closure), self.optimizers().step() and self.optimizers().zero_grad()"
)


class LightningOwner(Owner):
    """Hand losses to `module.manual_backward`: precision, strategy and `on_before_backward` see every full pass.

    Under DDP gradients are reduced once, in the last one.

    Args:
        module: a LightningModule under manual optimisation. Make the method in `on_fit_start`, when the model is where
            it will be trained. `lightning` itself is not imported.

    Raises:
        ValueError: the module is under automatic optimisation; the message says what to change.

    Examples:
        >>> from fastadv.integrations.lightning import LightningOwner
        >>> def on_fit_start(self):
        ...     self.adv = fastadv.PGD(self.model, backward=LightningOwner(self))
        >>> def training_step(self, batch, index):
        ...     self.adv.backward(lambda: self.model(**batch).loss, mask=batch["attention_mask"])
        ...     self.optimizers().step()
        ...     self.optimizers().zero_grad()
    """

    def __init__(self, module: Any) -> None:
        if module.automatic_optimization:
            raise ValueError(AUTOMATIC.format(name=type(module).__name__))
        self._module = module
        self.scaler: GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)

    def backward(self, loss: Tensor, last: bool) -> None:  # noqa: ARG002
        """`module.manual_backward`."""
        self._module.manual_backward(loss)

    def sync(self, last: bool) -> AbstractContextManager[Any]:
        """The strategy's `block_backward_sync`, where it has one, around all passes but the last."""
        block = getattr(self._module.trainer.strategy, "block_backward_sync", contextlib.nullcontext)
        return contextlib.nullcontext() if last else block()


class FabricOwner(Owner):
    """Hand losses to `fabric.backward`, and let probes pass where it insists on that (mixed precision).

    Args:
        fabric: the one that set the model up. `lightning` itself is not imported.
        model: as `fabric.setup` returned it.

    Examples:
        >>> from fastadv.integrations.lightning import FabricOwner
        >>> adv = fastadv.PGD(model, backward=FabricOwner(fabric, model))  # doctest: +SKIP
        >>> adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])  # doctest: +SKIP
    """

    def __init__(self, fabric: Any, model: Any) -> None:
        self._fabric, self._model = fabric, model
        self._wrappers: Any = sys.modules[type(model).__module__]  # of `lightning` or `lightning_fabric`
        self.scaler: GradScaler | None = getattr(fabric.strategy.precision, "scaler", None)

    def backward(self, loss: Tensor, last: bool) -> None:  # noqa: ARG002
        """`fabric.backward`."""
        self._fabric.backward(loss, model=self._model)

    @contextlib.contextmanager
    def probing(self) -> Iterator[None]:
        """A backward inside is one of Fabric's."""
        before = self._wrappers._in_fabric_backward
        self._wrappers._in_fabric_backward = True
        try:
            yield
        finally:
            self._wrappers._in_fabric_backward = before
