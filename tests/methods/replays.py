"""Training by FreeAT, replay by replay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import fastadv
from tests.support import batch, clear, ready, record

SIZES = [
    (4, 7),
    (4, 7),
    (2, 9),
    (2, 9),
    (4, 5),
    (4, 5),
]  # a smaller batch, a longer one, a shorter one; two replays each


def batches(sizes: list[tuple[int, int]] = SIZES) -> Iterator[dict[str, Tensor]]:
    return (batch(*size, seed=number // 2) for number, size in enumerate(sizes))


class Run:
    """A model, its optimizer and the method; every replay records what the model saw."""

    def __init__(self, **options: Any) -> None:
        self.model = ready()[0]
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        numbers = {"epsilon": 0.1, "step_size": 0.06, "replays": 2, **options}
        self.adv = fastadv.FreeAT(self.model, embedding=self.model.word_embeddings, **numbers)

    def replay(self, data: dict[str, Tensor], **options: Any) -> Tensor:
        """One replay and its optimizer step; the perturbation that the model saw."""
        clear(self.model)
        with record(self.model) as seen:
            self.adv.backward(lambda: self.model(**data).loss, mask=data["attention_mask"], **options)
        perturbation = (seen[0] - self.model.word_embeddings.weight[data["input_ids"]]).detach()
        self.optimizer.step()
        return perturbation
