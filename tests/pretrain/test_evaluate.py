"""What is measured, against the same by hand, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig, LlamaConfig

from fastadv.pretrain.evaluate import IGNORED, Document, Evaluator

VOCABULARY, PADDING, RADIUS = 40, 0, 0.5
SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": PADDING,
}


def model(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "causal":
            made = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE, num_key_value_heads=2))
        else:
            made = AutoModelForMaskedLM.from_config(BertConfig(**SIZE))
        return made.double().eval()


def documents(kind: str) -> list[Document]:
    """Of many lengths, one of a single token."""
    draw = random.Random(0)
    found = []
    for length in (9, 1, 17, 4, 12, *([6] * 20)):
        ids = [draw.randrange(1, VOCABULARY) for _ in range(length)]
        labels = ids if kind == "causal" else [one if place % 3 == 0 else IGNORED for place, one in enumerate(ids)]
        found.append(Document(ids, labels))
    return found


def evaluator(kind: str) -> Evaluator:
    return Evaluator(model(kind), causal=kind == "causal", padding=PADDING)


def by_hand(network: Any, kind: str, document: Document, embeddings: Tensor) -> Tensor:
    """The loss of one document by itself, from its embeddings on."""
    logits, labels = network(inputs_embeds=embeddings).logits[0], torch.tensor(document.labels)
    if kind == "causal":
        logits, labels = logits[:-1], labels[1:]
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_each_document_by_itself(kind: str) -> None:
    network = model(kind)
    found = evaluator(kind).losses(documents(kind))
    for document, loss in zip(documents(kind), found, strict=True):
        embeddings = network.get_input_embeddings()(torch.tensor([document.ids]))
        assert loss == pytest.approx(by_hand(network, kind, document, embeddings).item(), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_one_step_of_the_attack(kind: str) -> None:
    """A quarter of the radius up each document's own gradient, in units of the mean row norm."""
    network = model(kind)
    chosen = [one for one in documents(kind) if len(one.ids) > 1]
    judge = evaluator(kind)
    clean = judge.losses(chosen)
    (found,) = judge.attacked(chosen, clean, [RADIUS], steps=1)
    table = network.get_input_embeddings()
    length = RADIUS / 4 * float(table.weight.detach().norm(dim=1).mean())
    for document, before, loss in zip(chosen, clean, found, strict=True):
        embeddings = table(torch.tensor([document.ids])).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(by_hand(network, kind, document, embeddings), embeddings)
        moved = embeddings.detach() + length * gradient / gradient.norm()
        assert loss > before
        assert loss == pytest.approx(by_hand(network, kind, document, moved).item(), rel=1e-9)


def test_larger_radii_are_no_milder() -> None:
    judge, chosen = evaluator("causal"), documents("causal")
    clean = judge.losses(chosen)
    small, large = judge.attacked(chosen, clean, [0.1, 2.0], steps=3)
    assert all(a <= b <= c for a, b, c in zip(clean, small, large, strict=True))
    assert sum(large) > 1.02 * sum(small)


def test_what_a_smaller_radius_found_counts() -> None:
    """Its perturbation lies in the larger ball too, and the search there may end at a lower loss."""
    judge, chosen = evaluator("causal"), documents("causal")
    found = [1e6] * len(chosen)
    assert judge.attacked(chosen, found, [0.1, 0.2], steps=1) == [found, found]


def test_nothing_is_left_of_an_attack() -> None:
    judge = evaluator("causal")
    before = judge.losses(documents("causal"))
    weights = {name: one.detach().clone() for name, one in judge.model.named_parameters()}
    judge.attacked(documents("causal"), before, [1.0], steps=2)
    assert judge.losses(documents("causal")) == before
    assert all(torch.equal(one, weights[name]) for name, one in judge.model.named_parameters())
    assert all(one.grad is None for one in judge.model.parameters())
