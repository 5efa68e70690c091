# mypy: disable-error-code="no-untyped-call"
"""The main job's classifier: an encoder of transformers, a masked mean over tokens, a linear layer.

`save_pretrained` copies this file and its neighbours beside the weights, so they import nothing else of fastadv: where
fastadv is not installed, `from_pretrained(folder, trust_remote_code=True)` runs the copies.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_mean_pool import MeanPoolConfig
from .losses import losses


@dataclass
class Answer(SequenceClassifierOutput):
    """Return the output of a transformers classifier, and the loss of each sample [B], which LLR needs."""

    losses: Tensor | None = None


class MeanPoolClassifier(PreTrainedModel):
    r"""Classify by the masked mean of the last hidden states, dropout and a linear layer.

    .. math:: y = W \, \mathrm{dropout}\Big(\frac{\sum_t m_t h_t}{\sum_t m_t}\Big) + b

    Sentence encoders such as MiniLM were trained with this pooling; their first token alone says much less.
    """

    config_class = MeanPoolConfig
    base_model_prefix = "encoder"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: MeanPoolConfig) -> None:
        from transformers import AutoConfig, AutoModel  # once they are imported, this class is registered with them

        super().__init__(config)
        if config.encoder is None:
            raise ValueError("a MeanPoolConfig needs the configuration of its encoder")
        inner: Any = AutoConfig.for_model(**config.encoder)
        self.encoder = AutoModel.from_config(inner, **without_pooler(inner))
        self.dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(inner.hidden_size, len(config.id2label or {}))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Answer:
        """Compute logits [B, C] from ids [B, T]; with labels the loss too, mean and per sample: see `losses.losses`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}  # not every encoder takes them
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1)
        logits = self.head(self.dropout(pooled))
        if labels is None:
            return Answer(logits=logits)
        loss, each = losses(self.config.problem_type, logits, labels)
        return Answer(loss=loss, logits=logits, losses=each)


def without_pooler(config: Any) -> dict[str, bool]:
    """Leave out the pooling layer of encoders like BERT, which this head does not use."""
    from transformers import MODEL_MAPPING

    model: Any = MODEL_MAPPING.get(type(config), None)
    accepts = isinstance(model, type) and "add_pooling_layer" in inspect.signature(model).parameters
    return {"add_pooling_layer": False} if accepts else {}


MeanPoolClassifier.register_for_auto_class("AutoModelForSequenceClassification")  # save_pretrained copies this file
