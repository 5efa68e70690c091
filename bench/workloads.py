"""What is timed: embeddings of real models, batches of Zipf-distributed ids, networks, and how large each is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from bench.contest import Field
from bench.race import Entry, Run, nothing

PARTS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
LABELS = 3
LENGTH, RADIUS = 0.3, 0.2
CACHES = 128 << 20  # bytes: what is larger is read anew by every pass


Work = tuple[int, int, int]  # batch, length, vocabulary
Network = tuple[int, int, int, int]  # PARTS


class Shape(NamedTuple):
    """A batch [batch, length], and the table [vocabulary, dimension] that it is looked up in."""

    batch: int
    length: int
    vocabulary: int
    dimension: int


MODELS = {  # vocabulary and dimension of their tables; cases that do not see all see the first, or the first two
    "BERT-base": (30_522, 768),
    "XLM-R-base": (250_002, 768),
    "MiniLM": (30_522, 384),
    "Qwen": (151_936, 1024),
    "Gemma 640": (262_144, 640),
    "Gemma 2048": (262_144, 2048),
}
MAIN = tuple(MODELS)[:2]  # on both heaps
MINILM, BERT = (384, 6, 12, 1536), (768, 12, 12, 3072)
PGD = ("plain", "reference", "torch", "fused")


class Size(NamedTuple):
    shapes: dict[str, Shape]  # by model
    steps: tuple[Work, ...]  # of PGD-3
    network: Network
    small: tuple[int, int]  # batch of the steps of all methods
    methods: Network  # theirs
    logits: tuple[tuple[int, int], ...]
    gradients: tuple[int, int]  # of a model: how many tensors, of how many elements
    copy: int  # elements of the copy that measures the bandwidth
    growth: dict[str, tuple[int, ...]]  # what grows, and its values
    pgd: tuple[str, ...] = PGD  # contestants of PGD-3
    dtype: torch.dtype = torch.float32  # in a narrower one training runs under autocast


FULL = Size(
    {name: Shape(16, 128, *table) for name, table in MODELS.items()},
    ((16, 128, 30_522), (16, 128, 250_002)),
    MINILM,
    (8, 64),
    MINILM,
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
)
TINY = Size(
    {name: Shape(4, 16, vocabulary // 60, 32) for name, (vocabulary, _) in MODELS.items()},
    ((4, 16, 500), (4, 16, 4_000)),
    (32, 2, 2, 64),
    (2, 8),
    (32, 2, 2, 64),
    ((8, 2), (8, 300)),
    (5, 300),
    1 << 20,
    {"vocabulary": (100, 400), "tokens": (32, 64), "dimension": (8, 16), "steps": (1, 2), "whole step": (100, 400)},
)
ON_GPU: dict[str, Any] = {
    "pgd": (*PGD, "torch, index_add", "passes alone", "captured"),
    "dtype": torch.bfloat16,
    "growth": {},
}
SIZES = {
    "full": FULL,
    "tiny": TINY,
    "compare": FULL._replace(  # two revisions
        shapes={"BERT-base": FULL.shapes["BERT-base"]},
        steps=((16, 128, 30_522), (2, 16, 30_522)),
        small=(8, 32),
        methods=(128, 2, 2, 512),
        logits=((32, 1_000), (256, 30_522)),
        growth={},
    ),
    "gpu": FULL._replace(  # larger than its caches
        shapes={"256 x 512": Shape(256, 512, 30_522, 1024)},
        steps=((32, 128, 30_522), (8, 32, 30_522), (32, 128, 250_002)),
        network=BERT,
        logits=((2_048, 30_522),),
        gradients=(200, 600_000),
        copy=128 << 20,
        **ON_GPU,
    ),
    "rehearsal": TINY._replace(steps=((4, 16, 500), (2, 8, 500), (4, 16, 4_000)), copy=1 << 16, **ON_GPU),
}


def zipf(batch: int, length: int, vocabulary: int, exponent: float = 1.1) -> Tensor:
    """Ids [batch, length], P(id) ~ id ** -exponent from 1 on: vocabularies are ordered by frequency, and 0 pads."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.arange(1, vocabulary, dtype=torch.float64) ** -exponent
    drawn = torch.multinomial(weights, batch * length, replacement=True, generator=generator)
    return (drawn + 1).reshape(batch, length)


def table(vocabulary: int, dimension: int, device: str = "cpu") -> Tensor:
    drawn = torch.randn(vocabulary, dimension, generator=torch.Generator().manual_seed(1))
    return drawn.mul_(0.02).to(device)


def gradient(*shape: int, device: str = "cpu", seed: int = 2) -> Tensor:
    """A gradient at the embedding's output."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(1e-3).to(device)


def classifier(network: Network, vocabulary: int, device: str = "cpu") -> nn.Module:
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


def loss_closure(
    model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype = torch.float32
) -> Callable[..., Tensor]:
    """The loss of one fixed batch, or of another that is given; under autocast, if `dtype` is a narrow one."""

    def closure(given: dict[str, Tensor] = batch) -> Tensor:
        with torch.autocast(batch["input_ids"].device.type, dtype, enabled=dtype != torch.float32):
            loss: Tensor = model(**given).loss
        return loss

    return closure


class Workload:
    """Words of `dtype`, a float32 perturbation and its start, which a step has left at the edge of the ball."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        from fastadv import ops  # not before: `compare` chooses which fastadv this is

        self.shape, self.device = shape, device
        self.ids = zipf(shape.batch, shape.length, shape.vocabulary).to(device)
        self.weight = table(shape.vocabulary, shape.dimension, device).to(dtype)
        *grads, self.start = (
            gradient(*self.ids.shape, shape.dimension, device=device, seed=seed) for seed in (2, 3, 4)
        )
        self.grads = [grad.to(dtype) for grad in grads]  # they rotate: no run sees the last one's
        self.start *= 0.9 * RADIUS / self.start.norm()
        self.turn = 0  # each set-up moves it on
        self.groups = ops.segments(self.ids.flatten(), shape.vocabulary).trimmed()
        self.distinct = len(self.ids.unique())
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.word = self.weight.element_size()
        self.positions, self.words = self.ids.numel() * shape.dimension, self.distinct * shape.dimension  # elements
        self.passes = 1 + (self.grads[0].nbytes > CACHES)  # a norm over many rows comes before anything is written

    @property
    def grad(self) -> Tensor:
        """[B, T, D], of this turn."""
        return self.grads[self.turn % len(self.grads)]

    @property
    def flat(self) -> Tensor:  # [B * T, D]
        return self.grad.flatten(0, 1)

    def field(
        self, moved: int, runs: Mapping[str, Run], reset: Run = nothing, result: Run = nothing, tolerance: float = 1e-4
    ) -> Field:
        """Each from the same start, on the next gradient; `result` is what a run that returns nothing has written."""

        def setup() -> None:
            reset()
            self.turn += 1

        def entry(run: Run) -> Entry:
            return Entry(setup, run, lambda: result() if (found := run()) is None else found)

        entries = {name: entry(run) for name, run in runs.items()}
        return Field(entries, moved, self.shape, tolerance, rewind=partial(setattr, self, "turn", 0))


workload = lru_cache(maxsize=1)(Workload)
