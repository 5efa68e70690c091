"""Train adversarially in a loop with `accelerate`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastadv.engine.owner import Owner

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped, unused-ignore]

ELSEWHERE = {
    "DEEPSPEED": "accelerate steps DeepSpeed's optimizer in every backward, and a step of fastadv has several: make "
    "the engine with deepspeed.initialize, and give backward=fastadv.integrations.deepspeed.DeepSpeedOwner(engine)",
    "MEGATRON_LM": "Megatron-LM runs its own backward in its forward: adversarial passes are not supported under it",
}


class AccelerateOwner(Owner):
    """Hand losses to `accelerator.backward`.

    Under `accelerator.accumulate` that divides them by the number of micro-batches, the terms of SMART, VAT and
    BregmanProximal with them: leave `share` as it is. `backward=accelerator.backward` does the same, but for a float16
    scaler, and does not know by what is divided.

    Args:
        accelerator: the one that prepared the model. `accelerate` itself is not imported.

    Raises:
        ValueError: the accelerator trains with DeepSpeed or Megatron-LM.

    Examples:
        >>> from fastadv.integrations.accelerate import AccelerateOwner
        >>> adv = fastadv.PGD(model, backward=AccelerateOwner(accelerator))  # doctest: +SKIP
        >>> with accelerator.accumulate(model):  # doctest: +SKIP
        ...     adv.backward(lambda: model(**batch).loss, mask=batch["attention_mask"])
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    reads_gradients = False

    def __init__(self, accelerator: Accelerator) -> None:
        if accelerator.distributed_type in ELSEWHERE:
            raise ValueError(ELSEWHERE[accelerator.distributed_type])
        self._accelerator = accelerator
        self.scaler = accelerator.scaler

    @property
    def divisor(self) -> float:  # type: ignore[override]
        """The micro-batches of an optimizer step."""
        return float(self._accelerator.gradient_accumulation_steps)

    def backward(self, loss: Tensor, last: bool) -> None:  # noqa: ARG002
        """`accelerator.backward`."""
        self._accelerator.backward(loss)
