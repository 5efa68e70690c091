"""A classifier that collapses while it is trained is told, with what to change; one that learns is not."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.integrations.collapse import Collapse
from fastadv.integrations.transformers import AdversarialTrainer
from tests.integrations.by_hand import arguments, bert


def samples(count: int) -> list[dict[str, Tensor]]:
    """Three classes, each with a word of its own."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        ids = torch.randint(10, 40, (6,), generator=generator)
        ids[index % 6] = 1 + index % 3
        rows.append({"input_ids": ids, "attention_mask": torch.ones(6).long(), "labels": torch.tensor(index % 3)})
    return rows


def train(folder: Path, learning_rate: float) -> AdversarialTrainer:
    changes = {"per_device_train_batch_size": 32, "num_train_epochs": 8, "logging_steps": 5}
    trainer = AdversarialTrainer(
        model=bert(),
        args=arguments(folder, **changes, learning_rate=learning_rate),
        train_dataset=samples(320),
        adversary=(fastadv.FGM, {"epsilon": 0.05, "scope": "sample"}),
    )
    trainer.train()
    return trainer


def test_a_training_that_learns_nothing_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="FGM: .* Lower the radius of 0.05 "):
        trainer = train(tmp_path, 1e-5)
    assert len(trainer.warnings) == 1  # it does not say so every five steps


def test_one_that_learns_is_not(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not train(tmp_path, 0.05).warnings


class Adv:
    epsilon = 0.5


def said(logits: Tensor, labels: Tensor, loss: float, done: float = 1.0) -> list[str]:
    watch = Collapse()
    watch.add({"logits": logits}, labels, torch.tensor(loss))
    return watch.read(Adv(), done)  # type: ignore[arg-type]


def test_what_is_judged() -> None:
    labels = torch.arange(300) % 3
    right = torch.nn.functional.one_hot(labels, 3).float()
    one = torch.tensor([0.0, 1.0, 0.0]).expand(300, 3)
    assert "got one answer, class 1, which 33% of them have" in said(one, labels, 0.9)[0]
    assert "is 1.09: guessing has the labels' entropy, 1.1" in said(right, labels, 1.09)[0]
    assert not said(right, labels, 0.9)  # it learns
    assert not said(one, labels, 0.9, done=0.1) and not said(right, labels, 1.09, done=0.3)  # too early to say
    assert not said(one[:100], labels[:100], 0.9)  # too few
    assert not said(one, torch.ones(300).long(), 0.1)  # rightly
    half = torch.where(torch.arange(300) < 20, -100, labels)
    assert "the last 280 samples" in said(one, half, 0.9)[0]


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (torch.zeros(300, 4, 3), torch.zeros(300, 4).long()),  # tokens
        (torch.zeros(300, 3), torch.zeros(300, 3)),  # several labels
        (torch.zeros(300, 1), torch.zeros(300)),  # numbers
        (None, torch.zeros(300).long()),
        (torch.zeros(300, 3), None),
    ],
)
def test_other_tasks_are_left_alone(logits: Any, labels: Any) -> None:
    assert not said(logits, labels, 5.0)
