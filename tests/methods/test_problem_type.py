"""SMART, VAT and the Bregman proximal point compare answers as the model's problem asks, where nobody says how."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import fastadv
from tests.every import waves
from tests.models import TinyModel
from tests.oracles import regularisers as papers
from tests.oracles.setting import EVERYWHERE, Setting
from tests.support import assert_close, assert_gradients, batch, gradients, refused, seeded

SMART_LIKE = {"multi_label_classification": "symmetric_bernoulli", "regression": "mse", None: "symmetric_kl",
              "single_label_classification": "symmetric_kl"}  # fmt: skip
VAT_LIKE = {**SMART_LIKE, "multi_label_classification": "bernoulli", None: "kl", "single_label_classification": "kl"}


def model_of(problem: str | None, **config: Any) -> TinyModel:
    model = seeded(TinyModel)
    model.config = SimpleNamespace(problem_type=problem, **config)
    return model


@pytest.mark.parametrize("problem", SMART_LIKE)
def test_the_default_is_the_problems(problem: str | None) -> None:
    model = model_of(problem, num_labels=3)
    where: dict[str, Any] = {"embedding": "word_embeddings"}
    assert fastadv.SMART(model, **where).compare.kind == SMART_LIKE[problem]
    assert fastadv.SMART(model, **where).search_by.kind == SMART_LIKE[problem]
    assert fastadv.BregmanProximal(model).compare.kind == SMART_LIKE[problem]
    assert fastadv.VAT(model, **where).compare.kind == VAT_LIKE[problem]
    assert fastadv.VAT(torch.nn.DataParallel(model), **where).compare.kind == VAT_LIKE[problem]
    for kind in ("js", "bernoulli", "mse"):  # what is given goes before
        assert fastadv.VAT(model, divergence=kind, **where).compare.kind == kind
    assert fastadv.VAT(seeded(TinyModel), **where).compare.kind == "kl"  # without a config
    assert fastadv.VAT(model_of(None, num_labels=1), **where).compare.kind == "mse"


def test_the_problem_may_be_known_only_when_labels_are_seen() -> None:
    """transformers names it in the first forward with labels: by the time of the comparison."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes))
    adv = fastadv.SMART(model, epsilon=0.3, divergence=None)
    assert adv.compare.kind == "symmetric_kl"
    ids, labels = batch()["input_ids"], torch.tensor([[1.0, 0, 1]] * 4)
    result = adv.backward(lambda: model(input_ids=ids, labels=labels))
    assert model.config.problem_type == "multi_label_classification"
    assert adv.compare.kind == "symmetric_bernoulli"
    assert result.adv_loss is not None
    assert result.adv_loss > 0


class Labels(Setting):
    """The setting of the oracles, with a yes or no for each of three labels."""

    def __init__(self) -> None:
        super().__init__()
        self.model.config = SimpleNamespace(problem_type="multi_label_classification", num_labels=3)
        self.truth = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]]).double()

    def loss_at(self, words: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(self.answer_at(words), self.truth)

    def output(self) -> Any:
        logits = self.model(self.ids).logits
        return F.binary_cross_entropy_with_logits(logits, self.truth), logits


@EVERYWHERE
def test_smart_of_several_labels(fused: bool | None) -> None:
    here = Labels()
    numbers = {"epsilon": 0.1, "step_size": 0.05, "steps": 2, "weight": 2.0}
    start = here.noise * 0.01
    want = papers.smart(
        here.model, here.loss_at, here.answer_at, here.words, start,
        keep=here.keep, distance=papers.symmetric_bernoulli, **numbers,
    )  # fmt: skip
    here.check(here.make(fastadv.SMART, start, fused=fused, **numbers), here.output, want, 4)


@EVERYWHERE
def test_vat_of_several_labels(fused: bool | None) -> None:
    here = Labels()
    numbers = {"epsilon": 0.7, "xi": 0.05, "steps": 2, "weight": 1.5}
    start = here.noise * 0.01
    want = papers.vat(
        here.model, here.loss_at, here.answer_at, here.words, start,
        keep=here.keep, distance=papers.bernoulli, **numbers,
    )  # fmt: skip
    here.check(here.make(fastadv.VAT, start, fused=fused, **numbers), here.output, want, 4)


def test_a_teacher_of_several_labels() -> None:
    here = Labels()
    adv = fastadv.BregmanProximal(here.model, 3.0, 0.5)
    with torch.no_grad():
        for tensor in adv.teacher.values():
            tensor.mul_(0.9)
        adv.update()
        answer = torch.func.functional_call(here.model, adv.teacher, (here.ids,)).logits
    adv.backward(here.output)
    loss, logits = here.output()
    want = papers.symmetric_bernoulli(logits, answer)
    assert_close(adv.distance, want, 1e-9, "distance")
    found = gradients(here.model)
    here.model.zero_grad()
    (loss + 3 * want).backward()
    assert_gradients(found, gradients(here.model), 1e-9)


@pytest.mark.parametrize("kind", ["mse", "symmetric_bernoulli"])
def test_mt_dnns_search_stands_in_for_the_problems_divergence(kind: Any) -> None:
    """Labels are two classes each in it; for regression it is a sum of squares."""
    model, data = seeded(TinyModel), batch()
    adv = fastadv.SMART(model, embedding="word_embeddings", update="mt-dnn", divergence=kind, random_start=waves)
    result = adv.backward(lambda: model(**data))
    assert result.adv_loss is not None
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    if kind == "mse":
        assert adv.search_by.kind(a, b) == (a - b).square().sum()  # type: ignore[operator]
    else:
        pairs = [torch.stack((x.flatten(), torch.zeros(6)), -1) for x in (a, b)]
        assert torch.allclose(adv.search_by.kind(a, b), fastadv.methods.smart.stable_kl(*pairs))  # type: ignore[operator]


def test_one_label() -> None:
    """A single yes or no is a problem of labels; without a problem named it is one of the two."""
    model, data = seeded(lambda: TinyModel(classes=1)), batch()
    one = fastadv.VAT(model, embedding="word_embeddings", divergence="bernoulli")
    result = one.backward(lambda: {"logits": model(data["input_ids"]).logits.squeeze(-1)})
    assert result.adv_loss is not None
    assert result.adv_loss > 0
    one.close()
    adv = fastadv.VAT(model, embedding="word_embeddings")
    refused(
        model, lambda: adv.backward(lambda: {"logits": model(data["input_ids"]).logits}), ValueError, "'mse'",
        "'bernoulli'",
    )  # fmt: skip
