"""One pass of a Trainer: its loss, and of the outputs what the method reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fastadv.integrations.adversary import reads_logits, reads_outputs


class LossPass:
    """Calls `compute_loss` of an `AdversarialMixin`, and asks it for outputs only where somebody reads them.

    A Trainer whose loss needs no logits (TRL's SFTTrainer) makes them with a second forward, and without a gradient.
    Where a method compares logits they then come from a forward of their own.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._apart = False  # logits come from a forward of their own

    def __call__(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> dict[str, Any]:
        """The loss, scaled as the Trainer has it, the logits, and the losses of single samples where there are any."""
        trainer = self._trainer
        method = trainer.adversary
        compares = method is not None and reads_logits(method)
        asks = _classifies(inputs) or (method is not None and reads_outputs(method) and not self._apart)
        with trainer.compute_loss_context_manager():
            # A copy: label smoothing and compute_loss_func take the labels out of what they are given.
            computed = trainer.compute_loss(
                model, dict(inputs), return_outputs=asks, num_items_in_batch=num_items_in_batch
            )
            loss, output = computed if isinstance(computed, tuple) else (computed, None)
            logits = _field(output, "logits")
            if compares:
                lost = torch.is_grad_enabled() and isinstance(logits, Tensor) and not logits.requires_grad
                self._apart = self._apart or lost
                logits = _logits(model, inputs) if self._apart else logits
        passed = {"loss": self._scaled(loss, num_items_in_batch), "logits": logits}
        losses = _field(output, "losses")  # for LLR
        return passed if losses is None else {**passed, "losses": self._scaled(losses, num_items_in_batch)}

    def _scaled(self, loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """Divide by the micro-batches of the step, unless the loss was normalised over all of them already."""
        trainer = self._trainer
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or trainer.compute_loss_func is not None
        return loss if scaled else loss / trainer.current_gradient_accumulation_steps


def _classifies(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch may be one of classification, whose answers are watched (`Collapse`)."""
    labels = inputs.get("labels")
    return not isinstance(labels, Tensor) or labels.dim() < 2


def _logits(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return _field(model(**{name: value for name, value in inputs.items() if name != "labels"}), "logits")


def _field(output: Any, name: str) -> Any:
    """Read a field of a model's output, which may be a dict; None where there is none."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
