"""F1, Pearson's r and its interval, against values from their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastadv.train import metrics


def test_macro_f1_of_classes() -> None:
    """Two of three classes occur in the answers or the targets; the fourth does not count."""
    targets = torch.tensor([0, 0, 0, 1, 1, 2])
    answers = torch.tensor([0, 0, 1, 1, 0, 0])
    outputs = torch.nn.functional.one_hot(answers, 4).float()
    cell = metrics.cell("classification", 0.0, outputs, targets, answers == targets)
    each = [2 * 2 / (4 + 3), 2 * 1 / (2 + 2), 0]
    assert cell["f1"] == pytest.approx(sum(each) / 3)
    assert (cell["accuracy"], cell["right"]) == (0.5, "110100")


def test_f1_of_sets() -> None:
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 1, 0]])
    outputs = torch.tensor([[2.0, -1, -1], [1, -1, -1], [-1, -1, -1], [3, 1, -1]])
    correct = metrics.right("multi-label", outputs, targets)
    assert correct.tolist() == [True, False, True, False]
    cell = metrics.cell("multi-label", 0.0, outputs, targets, correct)
    assert cell["f1_micro"] == pytest.approx(2 * 3 / (4 + 4))
    assert cell["f1"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (1 + 2)) / 2)


def test_pearson_and_its_interval() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 50))
    y += x
    r = metrics.pearson(torch.tensor(x), torch.tensor(y))
    assert r == pytest.approx(np.corrcoef(x, y)[0, 1])
    low, high = metrics.fisher(r, 50)
    for end in (low, high):
        assert abs(math.atanh(end) - math.atanh(r)) == pytest.approx(1.959964 / math.sqrt(47))
    assert metrics.pearson(torch.ones(5), torch.arange(5.0)) == 0
    assert metrics.fisher(0.9, 3) == (-1, 1)


def test_fisher_covers() -> None:
    """Of normal samples with a correlation of 0.6, 95 in a hundred intervals hold it."""
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        x, noise = generator.normal(size=(2, 60))
        low, high = metrics.fisher(metrics.pearson(torch.tensor(x), torch.tensor(0.6 * x + 0.8 * noise)), 60)
        inside += low < 0.6 < high
    assert 0.92 < inside / 400 < 0.98
