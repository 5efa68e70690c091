"""A model in which a step can leave every kind of trace there is, and its batch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, D, CLASSES, LENGTH, BATCH = 20, 8, 3, 5, 3


class Laden(nn.Module):
    """A classifier; with `tied`, over the vocabulary and with the embedding table as its head.

    Attributes:
        writes: "all": every pass writes buffers of every kind, and draws from every generator; "counted": it counts
            itself and no more, which a compiler understands; "nothing".
    """

    def __init__(self, tied: bool = False, writes: str = "all") -> None:
        super().__init__()
        self.writes = writes
        self.embed = nn.Embedding(V, D, padding_idx=None if tied else 0)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, D))
        self.first = nn.Linear(D, D)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.BatchNorm1d(D)
        self.frozen = nn.Linear(D, D).requires_grad_(False)
        self.still = nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)).eval()
        self.unused = nn.Linear(D, 2)
        self.head = nn.Linear(D, V if tied else CLASSES, bias=not tied)
        if tied:
            self.head.weight = self.embed.weight
        self._buffers_of_every_kind()

    def _buffers_of_every_kind(self) -> None:
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int32))
        self.register_buffer("flag", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("shared", torch.arange(4), persistent=False)
        self.register_buffer("expanded", torch.zeros(1, 1, dtype=torch.int64).expand(2, 3))
        self.register_buffer("nothing", None)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.writes != "nothing":
            self.calls += 1
        if self.writes == "all":
            self._write()
        h = torch.tanh(self.first(self.embed(ids) + self.positions))
        h = self.norm(self.dropout(h).flatten(0, 1)).view_as(h)
        h = self.still(self.frozen(h))
        weight = mask.unsqueeze(-1).to(h.dtype)
        return self.head((h * weight).sum(1) / weight.sum(1))

    def _write(self) -> None:
        """Past the version counter, where autograd does not look; and a buffer that was not there."""
        self.seen.data += 1
        self.flag.data.logical_not_()
        self.phase.data += 1j
        self.mean.data.mul_(0.9).add_(random.random() + float(np.random.random()))  # noqa: NPY002 - the global one
        self.shared.numpy()[1] += 1
        self.expanded.data[0, 0] += 1
        if "cache" not in self._buffers:
            self.register_buffer("cache", torch.ones(2), persistent=False)


def batch(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Ids with repeats, their mask and labels; rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, V // 2, (BATCH, LENGTH), generator=generator)
    mask = (torch.arange(LENGTH) < torch.tensor([LENGTH - row % 3 for row in range(BATCH)]).unsqueeze(1)).long()
    return torch.where(mask.bool(), ids, 0), mask, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def closure(model: nn.Module, data: tuple[Tensor, Tensor, Tensor]) -> Callable[[], dict[str, Any]]:
    ids, mask, labels = data

    def run() -> dict[str, Any]:
        logits = model(ids, mask)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"loss": losses.mean(), "logits": logits, "losses": losses}

    return run
