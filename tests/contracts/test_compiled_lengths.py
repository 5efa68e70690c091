"""A compiled model and batches of many lengths: as many graphs as there are kinds of passes, and eager gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastadv
from tests.every import EVERY
from tests.models import CLASSES, D, V
from tests.support import assert_gradients, clear, gradients, seeded

LENGTHS = range(5, 15)
GRAPHS = {"fgm": 1, "pgd": 2, "smart": 2}  # of full passes, and of probes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.dropout = nn.LayerNorm(D), nn.Linear(D, D), nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.dropout(torch.tanh(self.linear(self.norm(hidden))))


class Model(nn.Module):
    """Blocks that mix no positions, a mean and a head. It counts its forwards, and draws before the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, CLASSES)
        self.layers = nn.ModuleList([Block()])
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        noise = torch.rand(())
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        logits = self.head(pooled) * (1 + noise)
        return F.cross_entropy(logits, labels), logits


def compiled(model: Model, whole: bool, **options: Any) -> Any:
    if whole:
        return torch.compile(model, backend="aot_eager", **options)
    for layer in model.layers:
        layer.compile(backend="aot_eager", **options)
    return model


def batch(length: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, V, (4, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[length], [length - 1], [length - 3], [length]])
    return ids, mask, torch.tensor([0, 1, 2, 0])


def train(adv: fastadv.Method, run: Callable[..., Any], model: Model, masked: bool) -> list[dict[str, Tensor]]:
    """A step of each length, from one state of torch's generator: the gradients after each, and the buffers."""
    found = []
    torch.manual_seed(4)
    for length in LENGTHS:
        clear(model)
        data = batch(length)
        adv.backward(lambda: run(*data), mask=data[1] if masked else None)  # noqa: B023
        found.append({**gradients(model), "calls": model.calls.double(), "drawn": torch.rand(1)})
    return found


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize(
    ("name", "whole"),
    [("fgm", True), ("pgd", True), ("smart", True), ("pgd", False)],
    ids=["fgm", "pgd", "smart", "pgd-per-block"],
)
def test_no_graph_per_length(name: str, whole: bool, masked: bool) -> None:
    want_model, model = seeded(Model), seeded(Model)
    want = train(EVERY[name](want_model, scope="sample"), want_model, want_model, masked)
    run = compiled(model, whole, dynamic=True)
    got = train(EVERY[name](run, scope="sample"), run, model, masked)
    for one, other in zip(got, want, strict=True):
        assert_gradients(one, other, 1e-9)
    assert counters["stats"]["unique_graphs"] == counters["frames"]["total"] == GRAPHS[name]
    assert not counters["graph_break"]
