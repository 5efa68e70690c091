"""Methods that are dropped without `close()`, and copies of models that have a method: neither leaves a trace."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import fastadv
from tests.every import EVERY
from tests.support import assert_unchanged, batch, clear, ready, snapshot

METHODS: dict[str, Callable[..., Any]] = {
    **{name: partial(make, embedding="word_embeddings") for name, make in EVERY.items()},
    "awp": fastadv.AWP,
    "bregman": fastadv.BregmanProximal,
    "hook": lambda model: fastadv.FGM(model, embedding=model.tap, scope="sample"),
}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@EACH
def test_a_method_that_is_dropped_takes_its_hooks_along(method: Any) -> None:
    model, data, closure = ready()
    before = snapshot(model)
    adv = method(model)
    adv.backward(closure, mask=data["attention_mask"])
    clear(model)
    torch.set_rng_state(before["rng"])
    gone = weakref.ref(adv)
    del adv
    gc.collect()
    assert gone() is None
    assert_unchanged(model, before)


def test_it_goes_at_once() -> None:
    """Without waiting for the garbage collector, which counts objects and not what they hold on a device."""
    model, data, closure = ready()
    gc.disable()
    try:
        for _ in range(3):
            adv = fastadv.PGD(model, scope="sample", embedding=model.tap)
            adv.backward(closure, mask=data["attention_mask"])
            del adv
        assert not model.tap._forward_hooks
    finally:
        gc.enable()


def test_an_optimizer_keeps_no_method_alive() -> None:
    model, _, _ = ready()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adv = fastadv.BregmanProximal(model).attach(optimizer)
    gone = weakref.ref(adv)
    del adv
    gc.collect()
    assert gone() is None and not optimizer._optimizer_step_post_hooks


@EACH
def test_a_copy_of_the_model_needs_no_fastadv(method: Any) -> None:
    model, data, closure = ready()
    adv = method(model)
    twin = copy.deepcopy(model)
    for net in (model, twin, copy.deepcopy(twin)):
        assert b"fastadv" not in pickle.dumps(net)
    read = pickle.loads(pickle.dumps(twin))
    assert torch.equal(read(**data).logits, model(**data).logits)
    adv.backward(closure, mask=data["attention_mask"])
    assert all(p.grad is None for p in twin.parameters())


def test_a_split_and_a_second_method() -> None:
    model, data = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Flatten(), nn.Linear(8, 1)), batch()
    methods = [fastadv.YOPO(model, split=model[1]), fastadv.FGM(model, scope="sample")]
    assert b"fastadv" not in pickle.dumps(copy.deepcopy(model))
    assert len(methods) == 2 and data
