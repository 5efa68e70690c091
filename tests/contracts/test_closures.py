"""What a closure may return and what it must not do, and the second one, `attack=`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from tests.every import COMPARING, EVERY
from tests.models import TinyModel
from tests.oracles import oracles
from tests.support import (
    assert_close,
    assert_gradients,
    batch,
    clear,
    gradients,
    ready,
    record,
    refused,
    with_gradients,
)


def closures(model: TinyModel) -> dict[str, tuple[Callable[[], Any], type[Exception], list[str]]]:
    """What a closure must not do, the error, and what it must say."""
    data = batch()

    def backwards() -> Tensor:
        loss = model(**data).loss
        loss.backward(retain_graph=True)
        return loss

    def without_grad() -> Tensor:
        with torch.no_grad():
            return model(**data).loss

    def embeds() -> Tensor:
        vectors = model.word_embeddings.weight[data["input_ids"]]
        return model(None, data["attention_mask"], data["labels"], inputs_embeds=vectors).loss

    def outside() -> Tensor:
        ids = data["input_ids"].clone()
        ids[0, 0] = 50
        return model(ids, labels=data["labels"]).loss

    return {
        "returns-none": (lambda: None, RuntimeError, ["embedding"]),
        "forgets-to-return": (lambda: [model(**data), None][1], TypeError, ["closure must return", "loss"]),
        "no-labels": (lambda: model(data["input_ids"]), TypeError, ["loss is None", "labels"]),
        "a-number": (lambda: model(**data).loss.item(), TypeError, ["closure must return", "float"]),
        "a-vector": (lambda: model(**data).logits[:, 0], ValueError, ["scalar", "(4,)"]),
        "an-integer": (lambda: model(**data).logits.argmax(), ValueError, ["scalar", "int64"]),
        "a-dict-without-loss": (lambda: {"logits": model(**data).logits}, TypeError, ["'loss'"]),
        "detached": (lambda: model(**data).loss.detach(), ValueError, ["no gradient", "detached"]),
        "no-grad": (without_grad, RuntimeError, ["no_grad"]),
        "calls-backward": (backwards, RuntimeError, ["called backward", "return the loss"]),
        "inputs-embeds": (embeds, RuntimeError, ["never ran", "bert.embeddings.word_embeddings", "inputs_embeds"]),
        "another-model": (lambda: with_gradients()(**data).loss, RuntimeError, ["never ran", "another model"]),
        "id-too-large": (outside, IndexError, ["id 50", "50 rows"]),
    }


@pytest.mark.parametrize("name", list(closures(with_gradients())))
@pytest.mark.parametrize("method", [*EVERY, "fgm-last", "pgd-last"])
def test_closures(method: str, name: str) -> None:
    if (method, name) in (("llr", "a-vector"), ("vat", "no-labels"), ("vat", "a-dict-without-loss")):
        pytest.skip("what this method takes")
    model = with_gradients()
    options = {"clean_weight": 0} if method.endswith("-last") else {}
    adv = EVERY[method.removesuffix("-last")](model, embedding=model.word_embeddings, **options)
    closure, error, phrases = closures(model)[name]
    refused(model, lambda: adv.backward(closure), error, *phrases)
    assert adv.attacked == 0


@pytest.mark.parametrize("name", COMPARING)
class TestClosures:
    def test_only_a_loss(self, name: str) -> None:
        model, data = with_gradients("tfm"), batch()
        adv = COMPARING[name](model, embedding=model.word_embeddings)
        phrases = [name.upper(), "only a loss", "(loss, logits)", "model(**batch)"]
        refused(model, lambda: adv.backward(lambda: model(**data).loss), TypeError, *phrases)

    def test_a_dict_without_logits(self, name: str) -> None:
        model, data = with_gradients("tfm"), batch()
        adv = COMPARING[name](model, embedding=model.word_embeddings)
        refused(model, lambda: adv.backward(lambda: {"loss": model(**data).loss}), TypeError, "without logits")

    def test_one_class(self, name: str) -> None:
        """The softmax of one class is one: a divergence of distributions would be zero, and nobody would know."""
        model, data, _ = ready(classes=1)
        data["labels"] = torch.randn(4).double()
        adv = COMPARING[name](model, embedding=model.word_embeddings)
        refused(model, lambda: adv.backward(lambda: model(**data)), ValueError, "one class", "divergence='mse'")
        adv.close()
        squared = COMPARING[name](model, embedding=model.word_embeddings, divergence="mse")
        squared.backward(lambda: model(**data))
        squared.backward(lambda: (model(**data).loss, model(**data).logits[:, 0]))

    def test_perturbed_needs_logits_too(self, name: str) -> None:
        model, data = with_gradients("tfm"), batch()
        adv = COMPARING[name](model, embedding=model.word_embeddings)
        with adv.perturbed(lambda: model(**data)), torch.no_grad():
            moved = model(**data).logits
        assert not torch.equal(moved, model(**data).logits)

        def search() -> None:
            with adv.perturbed(lambda: model(**data).loss):
                pytest.fail("the body must not run")

        refused(model, search, TypeError, "only a loss")


def returns(model: TinyModel, data: dict[str, Tensor]) -> dict[str, Callable[[], Any]]:
    """All that a closure may return."""
    return {
        "tensor": lambda: model(**data).loss,
        "output": lambda: model(**data),
        "dict": lambda: model(**data)._asdict(),
        "tuple": lambda: tuple(model(**data)),
        "list": lambda: list(model(**data)),
        "one-element": lambda: model(**data).loss.reshape(1),
    }


@pytest.mark.parametrize("name", EVERY)
def test_a_loss_in_place_of_a_closure(name: str) -> None:
    """The classic mistake: the error shows the line as it should be."""
    model, data = with_gradients(), batch()
    adv, loss = EVERY[name](model, embedding=model.word_embeddings), model(**data).loss
    right = ("not the loss", "adv.backward(lambda: model(**batch).loss)")
    for call in (adv.backward, adv.find, lambda wrong: adv.perturbed(wrong).__enter__()):
        refused(model, lambda: call(loss), TypeError, *right)  # noqa: B023
    refused(model, lambda: adv.backward(3), TypeError, "not int", right[1])


@pytest.mark.parametrize("form", ["output", "dict", "tuple", "list", "one-element"])
def test_what_a_closure_may_return(form: str) -> None:
    model, data, _ = ready()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    adv.backward(returns(model, data)["tensor"])
    want = gradients(model)
    clear(model)
    result = adv.backward(returns(model, data)[form])
    assert_gradients(gradients(model), want, 1e-12)
    assert type(result.output) is type(returns(model, data)[form]())
    assert result.loss.shape == result.adv_loss.shape == ()
    assert not result.loss.requires_grad
    assert not result.adv_loss.requires_grad
    assert set(vars(fastadv.StepResult)) >= {"loss", "adv_loss", "output"}


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_attack_follows_another_loss(scope: str, clean_weight: float) -> None:
    """The ascent maximises what `attack` returns (here: closeness to a target); the gradients are of the loss."""
    model, data, closure = ready()
    ids, weight = data["input_ids"], model.word_embeddings.weight
    target = (data["labels"] + 1) % 3

    def loss_at(embeds: Tensor, labels: Tensor) -> Tensor:
        return model(None, data["attention_mask"], labels, embeds).loss

    adv = fastadv.PGD(model, epsilon=0.5, embedding=model.word_embeddings, scope=scope, clean_weight=clean_weight)
    with record(model) as seen:
        result = adv.backward(closure, attack=lambda: -model(ids, data["attention_mask"], target).loss)
    path = oracles.attack(
        model,
        lambda e: -loss_at(e, target),
        weight,
        ids,
        scope=scope,
        epsilon=0.5,
        step_size=0.3,
        steps=3,
        clean_weight=0,
    )
    assert_close(seen[-1] - weight[ids], path.perturbations[-1], 1e-9, "perturbation")
    adversarial = loss_at(weight[ids] + path.perturbations[-1], data["labels"])
    total = adversarial + clean_weight * loss_at(weight[ids], data["labels"])
    assert_gradients(gradients(model), oracles.gradients_of(model, total), 1e-9)
    assert_close(result.adv_loss, adversarial, 1e-9, "adv_loss")
    if clean_weight:
        assert_close(result.loss, closure().loss, 1e-9, "loss")


@pytest.mark.parametrize("name", COMPARING)
def test_attack_takes_the_place_of_the_search(name: str) -> None:
    """The perturbation follows another loss; the penalty is the divergence there."""
    model, data = with_gradients("tfm"), batch()
    clear(model)
    seen = {}
    for sign in (1, -1):
        adv = COMPARING[name](
            model, embedding=model.word_embeddings, epsilon=0.1, random_start=lambda s, _: torch.zeros(s)
        )
        with record(model) as words:
            adv.backward(lambda: model(**data), attack=lambda: sign * model(**data).loss)  # noqa: B023
        seen[sign] = words[-1] - words[0]
        adv.close()
    assert_close(seen[1], -seen[-1], 1e-9, "perturbation")


@pytest.mark.parametrize("method", [fastadv.LLR, fastadv.NEFTune])
def test_attack_where_it_has_no_use(method: Any) -> None:
    model, data = with_gradients("tfm"), batch()
    adv = method(model, embedding=model.word_embeddings)
    closure = lambda: model(**data).loss  # noqa: E731
    refused(model, lambda: adv.backward(closure, attack=closure), ValueError, "attack=", "leave it out")
