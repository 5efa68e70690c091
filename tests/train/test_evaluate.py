"""Accuracy, its interval, and the attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastadv.train import model
from fastadv.train.data import Sample
from fastadv.train.evaluate import Evaluator
from fastadv.train.metrics import wilson
from fastadv.train.tokens import Tokens
from tests.train.conftest import texts

LABELS = ["bad", "good"]


@pytest.fixture
def evaluator(encoder: Path) -> Evaluator:
    torch.manual_seed(0)
    network = model.build(str(encoder), LABELS, 0.1)
    tokenizer = model.tokenizer_of(str(encoder))
    samples = [Sample(text, LABELS.index(label)) for text, label in texts(90)]
    return Evaluator(network, Tokens(samples, tokenizer, 64), tokenizer, progress=False)


def test_wilson() -> None:
    """Against values worked out from the definition: the shares p with |x/n - p| = z sqrt(p (1 - p) / n)."""
    for correct, total in ((0, 10), (5, 10), (81, 100), (500, 500)):
        low, high = wilson(correct, total)
        for p in {low, high} - {0.0, 1.0}:
            assert abs(correct / total - p) == pytest.approx(1.959964 * (p * (1 - p) / total) ** 0.5, rel=1e-6)
        assert 0 <= low <= correct / total <= high <= 1
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)


def right(evaluator: Evaluator) -> list[int]:
    """The samples that are classified as they should be."""
    hits: list[int] = (evaluator.clean().argmax(-1) == evaluator.targets).nonzero()[:, 0].tolist()
    return hits


def test_clean(evaluator: Evaluator) -> None:
    """One sample at a time, without padding, gives the same answers."""
    expected = []
    for index, item in enumerate(evaluator.data.items):
        with torch.no_grad():
            logits = evaluator.model(torch.tensor([item["input_ids"]])).logits
        if int(logits.argmax()) == item["labels"]:
            expected.append(index)
    assert right(evaluator) == expected
    assert 0 < len(expected) < 90


def pgd(network: Any, item: dict[str, Any], radius: float, steps: int) -> torch.Tensor:
    """One sample's attack by hand; returns the logits at its end."""
    ids, label = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
    delta = torch.zeros(1, ids.shape[1], 32, requires_grad=True)
    table = network.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, inputs, output: output + delta)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(F.cross_entropy(network(ids).logits, label), delta)
        with torch.no_grad():
            delta += radius / 4 * gradient / gradient.norm()
            delta *= min(1.0, radius / float(delta.norm()))
    with torch.no_grad():
        logits: torch.Tensor = network(ids).logits
    handle.remove()
    return logits


def test_attack_is_pgd_around_each_sample(evaluator: Evaluator) -> None:
    """In padded batches as one by one; radius after radius, what is turned stays turned."""
    clean = right(evaluator)
    radii = (0.05, 0.2)
    expected, alive = [], clean
    for radius in radii:
        alive = [
            index
            for index in alive
            if int(pgd(evaluator.model, evaluator.data.items[index], radius, 5).argmax())
            == evaluator.data.items[index]["labels"]
        ]
        expected.append(len(alive))
    found = evaluator.attacked(evaluator.clean(), radii[::-1], steps=5)
    assert [(cell["radius"], cell["correct"], cell["total"]) for cell in found] == list(
        zip(radii, expected, [90, 90], strict=True)
    )
    assert len(clean) > expected[0] > expected[1], "the attack must turn some samples at each radius"
    marks = found[1]["right"]
    assert [index for index, mark in enumerate(marks) if mark == "1"] == sorted(alive), "in the order of the samples"
    assert len(marks) == 90


def test_the_attack_leaves_the_model_alone(evaluator: Evaluator) -> None:
    before = {name: value.clone() for name, value in evaluator.model.state_dict().items()}
    evaluator.attacked(evaluator.clean()[:8], (0.1,), steps=2)
    assert all(torch.equal(value, before[name]) for name, value in evaluator.model.state_dict().items())
    assert all(parameter.grad is None for parameter in evaluator.model.parameters())
    assert "forward" not in vars(evaluator.model.get_input_embeddings())
    assert not evaluator.model.training


def test_nothing_left_to_attack(evaluator: Evaluator) -> None:
    wrong = F.one_hot(1 - evaluator.targets[:9]).float()
    (cell,) = evaluator.attacked(wrong, (0.1,), steps=2)
    assert (cell["correct"], cell["total"], cell["right"]) == (0, 9, "0" * 9)
