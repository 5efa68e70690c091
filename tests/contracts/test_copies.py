"""A method is pickled and copied with its model, and the copy is at work on the model's copy."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastadv
from tests.every import EVERY
from tests.models import TinyModel
from tests.support import assert_gradients, batch, gradients, ready, same_bits

EACH = pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)


def saved(method: fastadv.Method) -> Any:
    file = io.BytesIO()
    torch.save(method, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda method: pickle.loads(pickle.dumps(method)),
    "deepcopy": copy.deepcopy,
    "torch.save": saved,
}


@pytest.mark.filterwarnings("ignore:FreeAT. no parameter has changed")
@pytest.mark.parametrize(
    ("method", "way"),
    [(make, way) for name, make in EVERY.items() for way in COPIES if way != "torch.save" or name == "pgd"],
)
def test_a_copy_goes_on_where_the_method_was(method: Any, way: str) -> None:
    model, data, closure = ready()
    adv = method(model, embedding=model.word_embeddings, every=2)
    for _ in range(3):
        adv.backward(closure, mask=data["attention_mask"])
    twin = COPIES[way](adv)
    assert type(twin) is type(adv)
    assert repr(twin) == repr(adv)
    assert twin.model is not model
    assert same_bits(twin.model.word_embeddings.weight, model.word_embeddings.weight)
    assert (twin.attacked, twin._schedule.calls) == (2, 3)
    for one in (adv, twin):
        one.model.zero_grad()
        one.backward(lambda: one.model(**data), mask=data["attention_mask"], step=4)  # noqa: B023
    assert_gradients(gradients(twin.model), gradients(model), 1e-12)
    assert twin.attacked == 3


@EACH
def test_a_model_that_keeps_its_method(method: Any) -> None:
    """As a LightningModule does: the copy's method is at work on the copy."""
    model, data, closure = ready()
    model.adv = method(model, embedding=model.word_embeddings)
    model.adv.backward(closure)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.adv.model is twin
        assert twin.adv.attacked == 1
        twin.zero_grad()
        twin.adv.backward(lambda: twin(**data))  # noqa: B023
        assert all(grad.isfinite().all() for grad in gradients(twin).values())
    model.adv.close()


def test_a_teacher_is_copied_too() -> None:
    model, data, closure = ready()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    adv = fastadv.BregmanProximal(model, 2.0, 0.5, method=EVERY["smart"](model, embedding="word_embeddings"))
    adv.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        adv.backward(closure)
        optimizer.step()
    twin = copy.deepcopy(adv)
    assert twin.method.model is twin.model
    assert (twin.updates, twin.attacked) == (adv.updates, adv.attacked) == (2, 2)
    for name, tensor in adv.teacher.items():
        assert same_bits(twin.teacher[name], tensor)
    for one in (adv, twin):
        one.model.zero_grad()
        one.backward(lambda: one.model(**data))  # noqa: B023
    assert_gradients(gradients(twin.model), gradients(model), 1e-12)


def test_the_unit_of_relative_radii_is_the_methods_first() -> None:
    model, _, closure = ready()
    adv = fastadv.PGD(model, embedding="word_embeddings", relative=True, random_start=0.1, scope="sample")
    radius, loss = adv.rule.epsilon, closure().loss.item()
    with torch.no_grad():
        model.word_embeddings.weight.mul_(3)
    twin = copy.deepcopy(adv)
    assert twin.rule.epsilon == radius
    assert closure().loss.item() != loss
    starts = []
    for one in (adv, twin):
        torch.manual_seed(1)
        starts.append(one.find(lambda: one.model(**batch())).values[0])  # noqa: B023
    assert torch.equal(*starts)


def test_a_closed_method_stays_closed() -> None:
    model, _, _ = ready()
    adv = fastadv.FGM(model, embedding="word_embeddings")
    adv.close()
    twin = copy.deepcopy(adv)
    with pytest.raises(RuntimeError, match="closed"):
        twin.backward(lambda: twin.model(**batch()))
    assert not twin.model.word_embeddings._forward_hooks


def test_what_cannot_be_pickled_is_named() -> None:
    model = TinyModel()
    adv = fastadv.PGD(model, embedding="word_embeddings", random_start=lambda shape, mask: torch.zeros(shape))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(adv)
    assert isinstance(copy.deepcopy(adv).model, nn.Module)
