"""Bad input gets an error that says what to do, and nothing changes."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.ops.dispatch import Backend
from tests.every import EVERY, in_scopes
from tests.models import TinyModel
from tests.support import assert_unchanged, batch, refused, seeded, snapshot, with_gradients


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_a_frozen_model(method: Any) -> None:
    model = with_gradients().requires_grad_(False)
    refused(model, lambda: method(model, embedding=model.word_embeddings), ValueError, "frozen", "nfreeze")


@pytest.mark.parametrize("method", EVERY.values(), ids=EVERY)
def test_a_model_frozen_later(method: Any) -> None:
    model = with_gradients()
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
    model = with_gradients()
    message = refused(
        model,
        lambda: method(model, embedding=model.word_embeddings, fused=True),
        RuntimeError,
        "fused=True",
        "fused=None",
    )
    assert "ascend: no compiler found" in message


def test_a_negative_id() -> None:
    model, data = with_gradients(), batch()
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
    model, data = with_gradients(), batch()
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


@pytest.mark.parametrize("shape", [(4, 5), (2, 7)], ids=str)
@pytest.mark.parametrize(("name", "scope"), in_scopes("table", "sample", without="freeat"))
def test_a_closure_that_runs_another_batch_in_another_pass(name: str, scope: str, shape: tuple[int, int]) -> None:
    """A closure that draws from the loader: the perturbation of one batch says nothing about the next."""
    if name == "neftune":
        return  # it runs one pass
    model = with_gradients()
    adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
    batches = iter([batch(), batch(*shape), batch(), batch()])
    refused(model, lambda: adv.backward(lambda: model(**next(batches))), RuntimeError, "(4, 7", str(shape)[:-1])
    assert adv.attacked == 0


def test_a_step_inside_a_step() -> None:
    model, data = with_gradients(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)

    def nested() -> Tensor:
        return adv.backward(lambda: model(**data)).loss

    refused(model, lambda: adv.backward(nested), RuntimeError, "already running")
