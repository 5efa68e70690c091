"""What a Trainer tells its mixin about the training's course."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from fastadv.integrations.transformers import AdversarialMixin


class Events(TrainerCallback):
    """Tell the mixin about the training's course."""

    def __init__(self, trainer: AdversarialMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin: the one event between the wrapping of the model and its first call."""
        self.trainer.begin_adversary()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.begin_epoch()
