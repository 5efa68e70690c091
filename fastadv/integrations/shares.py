"""What each micro-batch of a Trainer's optimizer step weighs, for the terms that methods add to its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import Trainer


class Shares:
    """The positions that all micro-batches of one optimizer step have, where the loss is over all of their tokens.

    Args:
        trainer: an `AdversarialMixin`, whose masks say which positions count.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._all: Tensor | None = None

    def count(self, batches: Sequence[Mapping[str, Any]], device: Any) -> None:
        """Count those of a step; on all processes, where the loss is over the tokens of all."""
        trainer = self._trainer
        counted = sum(self._positions(batch) for batch in batches).to(device)  # type: ignore[union-attr]
        if self._averages():
            counted = trainer.accelerator.gather(counted.reshape(1)).sum()
        self._all = counted

    def forget(self) -> None:
        """The loss is a mean by micro-batch, and so is each term."""
        self._all = None

    def of(self, batch: Mapping[str, Any]) -> float | Tensor:
        """What a micro-batch weighs, where gradients are averaged over processes."""
        trainer = self._trainer
        if self._all is None:
            return 1 / float(trainer.current_gradient_accumulation_steps)
        times = trainer.accelerator.num_processes if self._averages() else 1
        return self._positions(batch) * times / self._all.clamp(min=1)

    def _averages(self) -> bool:
        return bool(self._trainer.args.average_tokens_across_devices) and self._trainer.accelerator.num_processes > 1

    def _positions(self, batch: Mapping[str, Any]) -> Tensor:
        """The samples; where labels are those of tokens, the positions that the mask of their shape has."""
        labels: Tensor = batch["labels"]
        if labels.dim() < 2 or labels.is_floating_point():
            return labels.new_tensor(len(labels))
        masks = self._trainer.adversarial_mask(batch)
        given = masks if isinstance(masks, (list, tuple)) else [masks]
        fitting = [mask for mask in given if isinstance(mask, Tensor) and mask.shape == labels.shape]
        return (fitting[-1] != 0).sum() if fitting else labels.new_tensor(labels.numel())
