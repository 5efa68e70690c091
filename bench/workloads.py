"""What is timed: batches of Zipf-distributed ids, tables, models, and the sizes of a full and of a tiny run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

PARTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


class Size(NamedTuple):
    """One choice of `--size`."""

    batch: int
    length: int
    vocabularies: tuple[int, ...]
    dimension: int  # of the attack step's embeddings
    model: tuple[int, int, int, int]  # PARTS
    copy: int  # elements of the copy that measures the bandwidth


SIZES = {
    "minilm": Size(16, 128, (30_522, 250_002), 768, (384, 6, 12, 1536), 64 << 20),
    "tiny": Size(4, 16, (500, 4_000), 32, (32, 2, 2, 64), 1 << 20),
}


def zipf(batch: int, length: int, vocabulary: int, exponent: float = 1.1) -> Tensor:
    """Ids [batch, length], P(id) ~ id ** -exponent from 1 on: vocabularies are ordered by frequency, and 0 pads."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.arange(1, vocabulary, dtype=torch.float64) ** -exponent
    drawn = torch.multinomial(weights, batch * length, replacement=True, generator=generator)
    return (drawn + 1).reshape(batch, length)


def table(vocabulary: int, dimension: int) -> Tensor:
    """An embedding table with the usual spread."""
    return 0.02 * torch.randn(vocabulary, dimension, generator=torch.Generator().manual_seed(1))


def gradient(*shape: int) -> Tensor:
    """A gradient at the embedding's output."""
    return 1e-3 * torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def classifier(model: tuple[int, int, int, int], vocabulary: int) -> nn.Module:
    """A BERT of these PARTS without dropout, in training mode."""
    torch.manual_seed(0)
    parts: dict[str, Any] = dict(zip(PARTS, model, strict=True))
    config = BertConfig(
        vocab_size=vocabulary, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=2, **parts
    )
    return BertForSequenceClassification(config).train()


def loss_closure(model: nn.Module, size: Size, vocabulary: int) -> Callable[[], Tensor]:
    """The loss of one fixed batch."""
    ids = zipf(size.batch, size.length, vocabulary)
    labels = torch.randint(0, 2, (size.batch,), generator=torch.Generator().manual_seed(3))
    return lambda: model(input_ids=ids, labels=labels).loss
