"""Bad input gets an error that says what to do, and nothing changes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from fastadv.ops.dispatch import Backend
from tests.every import EVERY, in_scopes
from tests.models import TinyModel
from tests.support import assert_unchanged, batch, refused, seeded, snapshot


def tiny() -> TinyModel:
    """A model with gradients from before, so that a change to them shows."""
    model, data = seeded(TinyModel), batch()
    model(**data).loss.backward()
    return model


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_a_frozen_model(method: Any) -> None:
    model = tiny().requires_grad_(False)
    refused(model, lambda: method(model, embedding=model.word_embeddings), ValueError, "frozen", "nfreeze")


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_a_model_frozen_later(method: Any) -> None:
    model = tiny()
    adv = method(model, embedding=model.word_embeddings)
    model.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match=r"frozen|gradient"):
        adv.backward(lambda: model(**batch()).loss)
    assert_unchanged(model, before)


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_not_a_module(method: Any) -> None:
    with pytest.raises(TypeError, match="Module"):
        method(lambda ids: ids)


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_fused_true_says_what_is_missing(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    op = sys.modules["fastadv.ops.ascend"].OP
    monkeypatch.setattr(op, "backends", {"cpu": Backend("C++", "cpu", op.eager, lambda: "no compiler found")})
    model = tiny()
    message = refused(
        model,
        lambda: method(model, embedding=model.word_embeddings, fused=True),
        RuntimeError,
        "fused=True",
        "fused=None",
    )
    assert "ascend: no compiler found" in message


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
        "another-model": (lambda: tiny()(**data).loss, RuntimeError, ["never ran", "another model"]),
        "id-too-large": (outside, IndexError, ["id 50", "50 rows"]),
    }


@pytest.mark.parametrize("name", list(closures(tiny())))
@pytest.mark.parametrize("method", [*EVERY, "fgm-last", "pgd-last"])
def test_closures(method: str, name: str) -> None:
    if (method, name) in (("llr", "a-vector"), ("vat", "no-labels"), ("vat", "a-dict-without-loss")):
        pytest.skip("what this method takes")
    model = tiny()
    options = {"clean_weight": 0} if method.endswith("-last") else {}
    adv = EVERY[method.removesuffix("-last")](model, embedding=model.word_embeddings, **options)
    closure, error, phrases = closures(model)[name]
    refused(model, lambda: adv.backward(closure), error, *phrases)
    assert adv.attacked == 0


def test_a_negative_id() -> None:
    model, data = tiny(), batch()
    data["input_ids"][1, 1] = -1
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    refused(model, lambda: adv.backward(lambda: model(**data)), IndexError, "id -1")


def test_an_id_out_of_range_on_the_general_path() -> None:
    """An embedding whose lookup is not plain goes through a hook: torch's own IndexError, nothing changed."""
    model, data = seeded(TinyModel), batch()
    model.word_embeddings.scale_grad_by_freq = True
    data["input_ids"][0, 0] = 50
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    refused(model, lambda: adv.backward(lambda: model(**data)), IndexError)


@pytest.mark.parametrize("shape", [(4, 6), (3, 7), (7, 4), (28,), (4, 7, 1)], ids=str)
@pytest.mark.parametrize("scope", ["table", "sample"])
@pytest.mark.parametrize("warm", [False, True], ids=["first-step", "second-step"])
def test_a_mask_of_another_shape(warm: bool, scope: str, shape: tuple[int, ...]) -> None:
    model, data = tiny(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope)
    if warm:
        adv.backward(lambda: model(**data), mask=data["attention_mask"])
    message = refused(
        model,
        lambda: adv.backward(lambda: model(**data), mask=torch.ones(shape)),
        ValueError,
        "mask",
        str(shape),
        "(4, 7",
    )
    assert "must be" in message


@pytest.mark.parametrize("returned", [torch.zeros(4, 7), None, torch.zeros(1, 7, 16)], ids=["2d", "none", "broadcast"])
def test_a_random_start_of_another_shape(returned: Any) -> None:
    model, data = tiny(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope="sample", random_start=lambda shape, mask: returned)
    refused(model, lambda: adv.backward(lambda: model(**data)), ValueError, "random_start", "(4, 7, 16)")


class Checkpointed(TinyModel):
    """The MLP, or all of the model, runs under a checkpoint."""

    reentrant, whole = True, False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        if self.whole:
            pooled = checkpoint(self.bert, input_ids, attention_mask, use_reentrant=self.reentrant)
        else:
            e = self.bert.embeddings(input_ids)
            pooled = checkpoint(lambda h: torch.tanh(self.bert.ff1(h)), e, use_reentrant=self.reentrant).mean(1)[:, :16]
        loss = nn.functional.cross_entropy(self.classifier(pooled), labels)
        return {"loss": loss}


@pytest.mark.parametrize("whole", [False, True], ids=["after-the-embedding", "around-the-embedding"])
@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
def test_reentrant_checkpointing(clean_weight: float, whole: bool) -> None:
    model, data = seeded(Checkpointed), batch()
    model.whole = whole
    adv = fastadv.PGD(model, embedding=model.word_embeddings, clean_weight=clean_weight)
    with pytest.warns() if whole else pytest.MonkeyPatch.context():
        refused(model, lambda: adv.backward(lambda: model(**data)), RuntimeError, "use_reentrant=False")


@pytest.mark.parametrize("shape", [(4, 5), (2, 7)], ids=str)
@pytest.mark.parametrize(("name", "scope"), in_scopes("table", "sample", without="freeat"))
def test_a_closure_that_runs_another_batch_in_another_pass(name: str, scope: str, shape: tuple[int, int]) -> None:
    """A closure that draws from the loader: the perturbation of one batch says nothing about the next."""
    if name == "neftune":
        return  # it runs one pass
    model = tiny()
    adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
    batches = iter([batch(), batch(*shape), batch(), batch()])
    refused(model, lambda: adv.backward(lambda: model(**next(batches))), RuntimeError, "(4, 7", str(shape)[:-1])
    assert adv.attacked == 0


def test_a_step_inside_a_step() -> None:
    model, data = tiny(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)

    def nested() -> Tensor:
        return adv.backward(lambda: model(**data)).loss

    refused(model, lambda: adv.backward(nested), RuntimeError, "already running")


def test_after_close() -> None:
    model, data = tiny(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)
    adv.close()
    refused(model, lambda: adv.backward(lambda: model(**data)), RuntimeError, "never ran", "closed")


def test_perturbed_refuses_what_backward_refuses() -> None:
    model, data = tiny(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)

    def search(closure: Callable[[], Any], mask: Tensor | None = None) -> None:
        with adv.perturbed(closure, mask=mask):
            pytest.fail("the body must not run")

    refused(model, lambda: search(lambda: None), RuntimeError, "never ran")
    refused(model, lambda: search(lambda: model(data["input_ids"])), TypeError, "labels")
    refused(model, lambda: search(lambda: model(**data), torch.ones(4, 6)), ValueError, "mask", "(4, 6)")
