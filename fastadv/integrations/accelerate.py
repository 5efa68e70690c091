"""Train adversarially in a loop with `accelerate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastadv.engine.owner import Owner, Resembling
from fastadv.integrations.stepping_engine import SteppingEngine

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped, unused-ignore]

MEGATRON = "Megatron-LM runs its own backward in its forward: adversarial passes are not supported under it"


class AccelerateOwner(Resembling):
    """Hand losses to `accelerator.backward`.

    Under `accelerator.accumulate` that divides them by the number of micro-batches, the terms of SMART, VAT and
    BregmanProximal with them: leave `share` as it is. `backward=accelerator.backward` does the same, but for a float16
    scaler, and does not know by what is divided.

    Under DeepSpeed `accelerator.backward` steps the optimizer too, after every pass. Here it steps once, in the
    `backward` of a method that ends an optimizer step: call one per `accelerator.accumulate`.

    Args:
        accelerator: the one that prepared the model. `accelerate` itself is not imported.

    Raises:
        ValueError: the accelerator trains with Megatron-LM, or with DeepSpeed and has prepared no model yet.

    Examples:
        >>> from fastadv.integrations.accelerate import AccelerateOwner
        >>> adv = fastadv.PGD(model, backward=AccelerateOwner(accelerator))  # doctest: +SKIP
        >>> with accelerator.accumulate(model):  # doctest: +SKIP
        ...     adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type == "MEGATRON_LM":
            raise ValueError(MEGATRON)
        engine = accelerator.distributed_type == "DEEPSPEED"
        super().__init__(SteppingEngine(accelerator) if engine else _Handed(accelerator))

    def register_step_post_hook(self, hook: Any) -> Any:
        """Under DeepSpeed, where this steps the optimizer: as torch optimizers have it."""
        return self.other.register_step_post_hook(hook)


class _Handed(Owner):
    """accelerate without DeepSpeed, where `accelerator.backward` is a backward."""

    reads_gradients = False

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.scaler = accelerator.scaler

    @property
    def divisor(self) -> float:  # type: ignore[override]
        """The micro-batches of an optimizer step."""
        return float(self._accelerator.gradient_accumulation_steps)

    def backward(self, loss: Tensor, last: bool) -> None:  # noqa: ARG002
        """`accelerator.backward`."""
        self._accelerator.backward(loss)
