"""Inputs of every form: dtypes, strides, masks, empty batches; and what a step may keep alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.every import EVERY
from tests.models import Stateful, TinyModel
from tests.oracles import oracles
from tests.support import PGD3, assert_gradients, batch, clear, gradients, seeded


def ready(scope: str) -> tuple[TinyModel, dict[str, Tensor], fastadv.Method]:
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    return model, data, fastadv.PGD(model, embedding="word_embeddings", scope=scope, **PGD3)


def strided(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


def every_other(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)[:, ::2]


FORMS = {
    "int32": lambda x: x.int(),
    "strided": strided,
    "every-other": every_other,
}
MASKS = {
    "bool": lambda m: m.bool(),
    "float": lambda m: m.float(),
    "double": lambda m: m.double(),
    "uint8": lambda m: m.to(torch.uint8),
    "strided": strided,
    "every-other": every_other,
}


@pytest.mark.parametrize("scope", oracles.SCOPES)
@pytest.mark.parametrize(("ids_as", "mask_as"), [(i, "bool") for i in FORMS] + [("strided", m) for m in MASKS])
def test_ids_and_masks_of_every_form(ids_as: str, mask_as: str, scope: str) -> None:
    model, data, adv = ready(scope)
    ids, mask, labels = data["input_ids"], data["attention_mask"], data["labels"]
    adv.backward(lambda: model(ids, labels=labels).loss, mask=mask)
    want = gradients(model)
    clear(model)
    ids, mask = FORMS[ids_as](ids), MASKS[mask_as](mask)
    adv.backward(lambda: model(ids, labels=labels).loss, mask=mask)
    assert_gradients(gradients(model), want, 1e-12)


@pytest.mark.parametrize("scope", oracles.SCOPES)
@pytest.mark.parametrize("shape", [(0, 7), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("start", [False, True], ids=["zero", "start"])
def test_an_empty_batch(start: bool, shape: tuple[int, int], scope: str) -> None:
    """Nothing to perturb: a step like any other, with nothing skipped and nothing NaN."""
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    adv = fastadv.PGD(model, scope=scope, random_start=start)
    result = adv.backward(lambda: model(torch.zeros(shape, dtype=torch.int64)).sum())
    assert float(result.adv_loss) == 0
    assert int(adv.skipped) == 0
    assert float(adv.perturbation_norm) == 0
    assert not any(grad.any() for grad in gradients(model).values())


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_the_default_device_is_not_the_models(scope: str) -> None:
    """What a step makes for itself is where the model is: C++ was given addresses on other devices."""
    results = []
    for device in ("cpu", "meta"):
        model, data = seeded(TinyModel), batch()
        with torch.device(device):
            torch.manual_seed(0)
            adv = fastadv.PGD(model, embedding="word_embeddings", scope=scope, random_start=0.1, clean_weight=0)
            adv.backward(lambda model=model, data=data: model.classifier(model.bert(data["input_ids"], None)).sum())
        results.append(gradients(model))
    assert_gradients(*results, 0)


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_ids_that_change_in_place_between_steps(scope: str) -> None:
    """A loader may reuse its buffer: what was derived from the ids of the last step must not be."""
    model, data, adv = ready(scope)
    ids, labels = data["input_ids"], data["labels"]
    adv.backward(lambda: model(ids, labels=labels).loss)
    clear(model)
    ids.copy_((ids * 7 + 3) % 50)
    adv.backward(lambda: model(ids, labels=labels).loss)
    want = oracles.attack(
        model,
        lambda e: model(labels=labels, inputs_embeds=e).loss,
        model.word_embeddings.weight,
        ids,
        scope=scope,
        **PGD3,
    )
    assert_gradients(gradients(model), want.gradients, 1e-9)


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_a_frozen_embedding_is_perturbed_and_gets_no_gradient(scope: str) -> None:
    model, data, adv = ready(scope)
    model.word_embeddings.requires_grad_(False)
    adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    want = oracles.attack(
        model,
        lambda e: model(None, data["attention_mask"], data["labels"], e).loss,
        model.word_embeddings.weight,
        data["input_ids"],
        scope=scope,
        mask=data["attention_mask"],
        **PGD3,
    )
    assert model.word_embeddings.weight.grad is None
    assert_gradients(gradients(model), want.gradients, 1e-9)


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_a_sparse_embedding_keeps_its_sparse_gradient(scope: str) -> None:
    model, data, adv = ready(scope)
    adv.backward(lambda: model(**data).loss)
    want = gradients(model)
    adv.close()
    clear(model)
    model.word_embeddings.sparse = True
    adv = fastadv.PGD(model, embedding="word_embeddings", scope=scope, **PGD3)
    adv.backward(lambda: model(**data).loss)
    assert model.word_embeddings.weight.grad.is_sparse
    got = {name: grad.to_dense() for name, grad in gradients(model).items()}
    assert_gradients(got, want, 1e-12)


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_nothing_of_the_graph_is_kept(method: Any) -> None:
    """Neither the method nor the result holds on to activations."""
    model, data, first = ready("sample")
    first.close()
    adv, refs = method(model, embedding="word_embeddings", scope="sample"), []

    def closure() -> Any:
        output = model(**data)
        refs.append(weakref.ref(output.logits))
        return output

    result = adv.backward(closure, mask=data["attention_mask"])
    gc.collect()
    assert result.output.logits.grad_fn is None
    assert [ref() for ref in refs] == [None] * len(refs)


def test_buffers_that_a_model_replaces_are_not_kept() -> None:
    """The copies for faults are of the buffers that there are, not of all that there were."""

    class Replaces(Stateful):
        def forward(self, ids: Tensor, labels: Tensor) -> Any:
            self.calls = self.calls + 1
            return super().forward(ids, labels)

    model, data, refs = seeded(Replaces), batch(), []
    adv = fastadv.PGD(model, embedding="embed")
    for _ in range(5):
        refs.append(weakref.ref(model.calls))
        adv.backward(lambda: model(data["input_ids"], data["labels"]).loss)
    gc.collect()
    assert [ref() for ref in refs[:3]] == [None] * 3


def test_weights_are_not_even_written_to() -> None:
    """The version counter shows any write, also one that is undone."""
    model, data, adv = ready("table")
    versions = [p._version for p in model.parameters()]
    adv.backward(lambda: model(**data).loss)
    with adv.perturbed(lambda: model(**data).loss):
        model(**data)
    assert [p._version for p in model.parameters()] == versions
