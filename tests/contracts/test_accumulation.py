"""What is in `.grad`: by the caller's backward, scaled, and added to what was there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from tests.every import EVERY, in_scopes
from tests.support import assert_close, assert_gradients, batch, clear, gradients, ready, record


@pytest.mark.parametrize(("method", "passes"), [(fastadv.FGM, 2), (fastadv.PGD, 4)])
@pytest.mark.parametrize(("clean_weight", "full"), [(1.0, 2), (0.0, 1), (0.5, 2)])
def test_backward_takes_every_full_pass_and_no_probe(method: Any, passes: int, clean_weight: float, full: int) -> None:
    model, _, closure = ready()
    losses: list[Tensor] = []
    forwards = []

    def backward(loss: Tensor) -> None:
        losses.append(loss.detach())
        loss.backward()

    def counted() -> Any:
        forwards.append(1)
        return closure()

    adv = method(model, embedding=model.word_embeddings, clean_weight=clean_weight, adv_weight=0.5, backward=backward)
    result = adv.backward(counted)
    assert len(forwards) == passes
    assert len(losses) == full
    assert_close(losses[-1], 0.5 * result.adv_loss, 1e-12, "the loss that backward was given")
    if full == 2:
        assert_close(losses[0], clean_weight * result.loss, 1e-12, "the clean loss that backward was given")
    mine = gradients(model)
    clear(model)
    twin, _, _ = ready()
    other = method(twin, embedding=twin.word_embeddings, clean_weight=clean_weight, adv_weight=0.5)
    other.backward(lambda: twin(**batch()).loss)
    assert_gradients(mine, gradients(twin), 1e-12)


@pytest.mark.parametrize(("name", "scope"), in_scopes("table", "sample", without="freeat"))
def test_scaler(name: str, scope: str) -> None:
    """Gradients come out scaled, as after `scaler.scale(loss).backward()`; the perturbation is the same."""
    method = EVERY[name]
    model, _, closure = ready(torch.float32)
    plain = method(model, embedding=model.word_embeddings, scope=scope)
    with record(model) as seen:
        plain.backward(closure)
    want = gradients(model)
    plain.close()
    clear(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    adv = method(model, embedding=model.word_embeddings, scope=scope, scaler=scaler)
    with record(model) as seen_scaled:
        adv.backward(closure)
    assert_gradients({name: grad / 2**10 for name, grad in gradients(model).items()}, want, 1e-5)
    for mine, its in zip(seen_scaled, seen, strict=True):
        assert_close(mine, its, 1e-6, "embedding")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.classifier.weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert_close(model.classifier.weight, before - 0.1 * want["classifier.weight"], 1e-6, "weight")


@pytest.mark.parametrize(("name", "scope"), in_scopes("table", "sample", without="freeat"))
def test_accumulation_follows_the_direction_of_the_micro_batch_alone(name: str, scope: str) -> None:
    model, _, first = ready()
    second_batch = batch(seed=9)
    runs = []
    for closures in ([first], [lambda: model(**second_batch)], [first, lambda: model(**second_batch)]):
        clear(model)
        adv = EVERY[name](model, embedding=model.word_embeddings, scope=scope)
        with record(model) as seen:
            for closure in closures:
                adv.backward(closure)
        adv.close()
        runs.append((gradients(model), seen))
    (one, seen_one), (two, seen_two), (both, seen_both) = runs
    assert_gradients(both, {name: one[name] + two[name] for name in one}, 1e-12)
    for mine, alone in zip(seen_both, seen_one + seen_two, strict=True):
        assert_close(mine, alone, 1e-12, "embedding")
