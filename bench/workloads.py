"""What is timed: embeddings of real models, batches of Zipf-distributed ids, networks, and how large each is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

PARTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LABELS = 3


class Shape(NamedTuple):
    """A batch [batch, length], and the table [vocabulary, dimension] that it is looked up in."""

    batch: int
    length: int
    vocabulary: int
    dimension: int


MODELS = {  # vocabulary and dimension of their tables
    "BERT-base": (30_522, 768),
    "MiniLM": (30_522, 384),
    "XLM-R-base": (250_002, 768),
    "Qwen": (151_936, 1024),
    "Gemma 640": (262_144, 640),
    "Gemma 2048": (262_144, 2048),
}
MAIN = ("BERT-base", "XLM-R-base")  # those that both heaps and every op see


class Size(NamedTuple):
    """One choice of `--size`."""

    shapes: dict[str, Shape]  # by model
    batch: tuple[int, int]  # of training steps
    small: tuple[int, int]  # of the steps of all methods
    vocabularies: tuple[int, int]
    network: tuple[int, int, int, int]  # PARTS
    logits: tuple[tuple[int, int], ...]
    gradients: tuple[int, int]  # of a model: how many tensors, of how many elements
    copy: int  # elements of the copy that measures the bandwidth
    growth: dict[str, tuple[int, ...]]  # along each axis of test_scaling


SIZES = {
    "full": Size(
        {name: Shape(16, 128, *table) for name, table in MODELS.items()},
        (16, 128),
        (8, 64),
        (30_522, 250_002),
        (384, 6, 12, 1536),
        ((32, 2), (32, 1_000), (256, 30_522), (32, 250_002)),
        (100, 200_000),
        64 << 20,
        {
            "vocabulary": (4_000, 16_000, 64_000, 250_000),
            "tokens": (512, 2_048, 8_192, 32_768),
            "dimension": (256, 512, 1_024, 2_048),
            "steps": (1, 2, 4, 8),
            "whole step": (4_000, 16_000, 64_000, 250_000),
        },
    ),
    "tiny": Size(
        {name: Shape(4, 16, vocabulary // 60, 32) for name, (vocabulary, _) in MODELS.items()},
        (4, 16),
        (2, 8),
        (500, 4_000),
        (32, 2, 2, 64),
        ((8, 2), (8, 300)),
        (5, 300),
        1 << 20,
        {
            "vocabulary": (100, 400),
            "tokens": (32, 64),
            "dimension": (8, 16),
            "steps": (1, 2),
            "whole step": (100, 400),
        },
    ),
}


def zipf(batch: int, length: int, vocabulary: int, exponent: float = 1.1) -> Tensor:
    """Ids [batch, length], P(id) ~ id ** -exponent from 1 on: vocabularies are ordered by frequency, and 0 pads."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.arange(1, vocabulary, dtype=torch.float64) ** -exponent
    drawn = torch.multinomial(weights, batch * length, replacement=True, generator=generator)
    return (drawn + 1).reshape(batch, length)


def table(vocabulary: int, dimension: int, device: str = "cpu") -> Tensor:
    """An embedding table with the usual spread."""
    drawn = torch.randn(vocabulary, dimension, generator=torch.Generator().manual_seed(1))
    return drawn.mul_(0.02).to(device)


def gradient(*shape: int, device: str = "cpu", seed: int = 2) -> Tensor:
    """A gradient at the embedding's output."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(1e-3).to(device)


def classifier(network: tuple[int, int, int, int], vocabulary: int, device: str = "cpu") -> nn.Module:
    """A BERT of these PARTS without dropout, in training mode."""
    torch.manual_seed(0)
    parts: dict[str, Any] = dict(zip(PARTS, network, strict=True))
    config = BertConfig(
        vocab_size=vocabulary, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=LABELS, **parts
    )
    return BertForSequenceClassification(config).train().to(device)


def inputs(batch: int, length: int, vocabulary: int, device: str = "cpu") -> dict[str, Tensor]:
    """One fixed batch; every token is real."""
    labels = torch.randint(0, LABELS, (batch,), generator=torch.Generator().manual_seed(3))
    return {"input_ids": zipf(batch, length, vocabulary).to(device), "labels": labels.to(device)}


def loss_closure(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The loss of one fixed batch."""
    return lambda: model(**batch).loss
