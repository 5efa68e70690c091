"""A model whose parts are replaced between steps: its methods follow, or say that they cannot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastadv
from tests.bert import VOCABULARY, text, tiny_bert
from tests.every import EVERY
from tests.models import TinyModel
from tests.support import assert_gradients, batch, clear, gradients, ready, refused, seeded

METHODS: dict[str, Callable[..., Any]] = {
    **{name: partial(make, embedding="word_embeddings") for name, make in EVERY.items()},
    "pgd-table": partial(fastadv.PGD, scope="table", embedding="word_embeddings"),
    "pgd-both": partial(fastadv.PGD, scope="row", tied="both", embedding="word_embeddings"),
    "awp": fastadv.AWP,
    "bregman": partial(fastadv.BregmanProximal, decay=0.5),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def assigned(model: nn.Module) -> nn.Module:
    other = seeded(lambda: TinyModel("tfm"), seed=5)
    model.load_state_dict(other.state_dict(), assign=True)
    return model


def moved(model: nn.Module) -> nn.Module:
    return model.to(torch.float32)


@pytest.mark.filterwarnings("ignore:FreeAT. no parameter has changed")
@pytest.mark.parametrize("change", [assigned, moved])
@EACH
def test_a_step_is_what_a_new_methods_would_be(method: Any, change: Callable[[nn.Module], nn.Module]) -> None:
    model, data, closure = ready()
    adv = method(model)
    for _ in range(2):
        adv.backward(closure, mask=data["attention_mask"])
    clear(model)
    change(model)
    if isinstance(adv, fastadv.BregmanProximal):
        adv.update()
    fresh_model = seeded(lambda: TinyModel("tfm")).to(next(model.parameters()).dtype)
    fresh_model.load_state_dict(model.state_dict())
    fresh = method(fresh_model)
    if isinstance(adv, fastadv.FreeAT):
        fresh._slots.buffers = {key: slot.clone() for key, slot in adv._slots.buffers.items()}
        fresh._schedule.calls, fresh._micro, fresh._last = adv._schedule.calls, adv._micro, adv._last
    if isinstance(adv, fastadv.BregmanProximal):
        fresh.load_state_dict(adv.state_dict())
    found = []
    for one, net in ((adv, model), (fresh, fresh_model)):
        torch.manual_seed(3)
        result = one.backward(lambda net=net: net(**data), mask=data["attention_mask"])
        found.append((gradients(net), result.adv_loss))
    assert_gradients(found[0][0], found[1][0], 1e-6)
    assert abs(found[0][1] - found[1][1]) <= 1e-6 * abs(found[1][1])


def test_awp_moves_the_weights_that_the_model_has_now() -> None:
    model, data, _ = ready()
    adv = fastadv.AWP(model, gamma=0.1)
    adv.backward(lambda: model(**data))
    assigned(model)
    before, seen = {name: p.detach().clone() for name, p in model.named_parameters()}, []

    def closure() -> Any:
        seen.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
        return model(**data)

    adv.backward(closure)
    assert not seen[0] and {"bert.ff1.weight", "classifier.weight"} <= seen[1]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_awp_moves_what_is_trained_now() -> None:
    model, data, _ = ready()
    model.bert.ff1.weight.requires_grad_(False)
    adv, moved = fastadv.AWP(model, gamma=0.1), []
    for trained in (False, True):
        model.bert.ff1.weight.requires_grad_(trained)
        before, seen = model.bert.ff1.weight.detach().clone(), []

        def closure() -> Any:
            seen.append(not torch.equal(model.bert.ff1.weight, before))  # noqa: B023
            return model(**data)

        adv.backward(closure)
        moved.append(seen[-1])
    assert moved == [False, True]


def test_the_teacher_follows_the_weights_that_the_model_has_now() -> None:
    model, data, _ = ready()
    adv = fastadv.BregmanProximal(model, decay=0.5)
    adv.update()
    assigned(model)
    for _ in range(60):
        adv.update()
    assert all(torch.allclose(adv.teacher[name], p, atol=1e-9) for name, p in model.named_parameters())
    adv.backward(lambda: model(**data))
    assert adv.distance < 1e-9


def test_a_teacher_of_another_shape_is_refused() -> None:
    model, data, _ = ready()
    adv = fastadv.BregmanProximal(model)
    model.classifier.weight = nn.Parameter(torch.zeros(5, model.classifier.weight.shape[1], dtype=torch.float64))
    refused(
        model, lambda: adv.backward(lambda: model(**data)), RuntimeError, "classifier.weight was", "make the method"
    )


@pytest.mark.parametrize("name", ["fgm", "pgd-table", "pgd-both", "freelb", "yopo", "awp"])
def test_resize_token_embeddings(name: str) -> None:
    """New ids are perturbed like the others."""
    model = tiny_bert()
    options = {"split": None} if name == "yopo" else {}
    adv = METHODS[name](model, **options)
    data = text()
    adv.backward(lambda: model(**data), mask=data["attention_mask"])
    clear(model)
    model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
    data["input_ids"][0, 0] = VOCABULARY + 6
    result = adv.backward(lambda: model(**data), mask=data["attention_mask"])
    table = model.get_input_embeddings().weight
    assert table.grad.shape == table.shape == (VOCABULARY + 7, 32)
    assert table.grad[VOCABULARY + 6].abs().sum() > 0
    assert result.adv_loss != result.loss


@pytest.mark.parametrize("name", ["fgm", "pgd-table", "freelb", "vat"])
def test_an_embedding_that_was_replaced_is_refused(name: str) -> None:
    model, data = seeded(TinyModel), batch()
    adv = METHODS[name](model)
    model.bert.embeddings.word_embeddings = seeded(lambda: nn.Embedding(50, model.word_embeddings.weight.shape[1]))
    refused(model, lambda: adv.backward(lambda: model(**data)), RuntimeError, "replaced", "make the method again")
