# mypy: disable-error-code="no-untyped-call"
"""Hold the configuration of the main job's classifier. `save_pretrained` copies this file: it imports no fastadv."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class MeanPoolConfig(PreTrainedConfig):
    """Hold the configuration of the encoder and of the head."""

    model_type = "fastadv-mean-pool"
    keys_to_ignore_at_inference = ("losses",)

    def __init__(self, encoder: dict[str, Any] | None = None, head_dropout: float = 0.1, **kwargs: Any) -> None:
        self.encoder = encoder
        self.head_dropout = head_dropout
        super().__init__(**kwargs)


MeanPoolConfig.register_for_auto_class()  # save_pretrained copies this file
