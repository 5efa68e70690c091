"""A model's wrappers are read at each step, and a table is judged when it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import fastadv
from tests.models import TinyModel
from tests.support import assert_gradients, gradients, ready, seeded

PLACE: dict[str, Any] = {"embedding": "word_embeddings"}
REFUSED: dict[str, Callable[[nn.Module], fastadv.Method]] = {
    "ZeRO-3 shards them": fastadv.AWP,
    "ZeRO-3 shards it": fastadv.BregmanProximal,
    "this one is sharded": lambda model: fastadv.PGD(model, scope="table", tied="both", **PLACE),
    "has freed them": lambda model: fastadv.PGD(model, relative=True, **PLACE),
    "lose gradients": lambda model: fastadv.LLR(model, epsilon=0.1, **PLACE),
}


def marked(model: TinyModel) -> TinyModel:
    """As DeepSpeed's ZeRO-3 marks what it gathers for a pass and frees after it."""
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    return model


@pytest.mark.parametrize("scope", ["table", "sample"])
@pytest.mark.parametrize("late", [True, False])
def test_a_table_that_is_gathered_is_no_plain_lookup(scope: str, late: bool) -> None:
    """Nobody keeps it over an ascent, which would read it."""
    model, _, closure = ready()
    if not late:
        marked(model)
    adv = fastadv.PGD(model, epsilon=0.5, step_size=0.3, scope=scope, **PLACE)
    if late:
        marked(model)
    adv.backward(closure)
    assert all(lookup.table is None for lookup in adv._engine.buffers.lookups)
    found = gradients(model)
    model, _, closure = ready()
    fastadv.PGD(model, epsilon=0.5, step_size=0.3, scope=scope, **PLACE).backward(closure)
    assert_gradients(found, gradients(model), 1e-12)


@pytest.mark.parametrize("phrase", REFUSED)
def test_what_needs_whole_weights_is_refused(phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase):
        REFUSED[phrase](marked(seeded(lambda: TinyModel("mlp"))))


@pytest.mark.parametrize("phrase", [phrase for phrase in REFUSED if phrase != "has freed them"])
def test_what_needs_whole_weights_is_refused_in_a_step_too(phrase: str) -> None:
    model, _, closure = ready()
    adv = REFUSED[phrase](model)
    marked(model)
    with pytest.raises(ValueError, match=phrase):
        adv.backward(closure)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_is_compiled_late() -> None:
    model, _, closure = ready()
    adv = fastadv.LLR(model, epsilon=0.1, **PLACE)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="differentiates the model twice"):
        adv.backward(closure)
