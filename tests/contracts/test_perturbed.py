"""`perturbed`, for evaluation: inside, the model sees the worst perturbation; outside, it is itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from tests.oracles import oracles
from tests.support import (
    assert_close,
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    ready,
    refused,
    same_bits,
    snapshot,
    with_gradients,
)


@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("scope", oracles.SCOPES)
@pytest.mark.parametrize(("method", "steps", "step_size"), [(fastadv.FGM, 1, 0.5), (fastadv.PGD, 3, 0.3)])
def test_perturbed_applies_the_worst_perturbation(
    method: type[fastadv.Method], steps: int, step_size: float, scope: str, norm: str
) -> None:
    """What is found is the oracle's r_K; inside, gradients may be off; outside, the model is itself again."""
    model, data, closure = ready()
    model.eval()
    ids, mask = data["input_ids"], data["attention_mask"]
    options = {"step_size": step_size, "steps": steps} if method is fastadv.PGD else {}
    adv = method(model, embedding="word_embeddings", epsilon=0.5, scope=scope, norm=norm, **options)
    closure().loss.backward()
    before, plain = snapshot(model), model(**data).logits
    with adv.perturbed(closure, mask=mask), torch.no_grad():
        logits = model(ids, mask).logits
        again = model(ids, mask).logits
    assert_unchanged(model, before)
    want = oracles.attack(
        model,
        lambda e: model(None, mask, data["labels"], e).loss,
        model.word_embeddings.weight,
        ids,
        scope=scope,
        norm=norm,
        epsilon=0.5,
        step_size=step_size,
        steps=steps,
        mask=mask,
        clean_weight=0,
    )
    embeds = model.word_embeddings.weight[ids] + want.perturbations[-1]
    assert_close(logits, model(None, mask, None, embeds).logits, 1e-9, "logits")
    assert same_bits(logits, again)
    assert same_bits(model(**data).logits.detach(), plain.detach())
    assert adv.attacked == 0


def test_perturbed_on_a_frozen_evaluation() -> None:
    """`eval()` and parameters that want no gradient afterwards: evaluation needs the perturbation's gradient alone."""
    model, data, closure = ready()
    adv = fastadv.PGD(model, embedding="word_embeddings", scope="sample")
    model.eval()
    model.requires_grad_(False)
    plain = float(closure().loss)
    with adv.perturbed(closure, mask=data["attention_mask"]), torch.inference_mode():
        worst = float(closure().loss)
    assert worst > plain


def test_perturbed_and_backward_take_turns() -> None:
    model, _, closure = ready()
    adv = fastadv.PGD(model, embedding="word_embeddings")
    adv.backward(closure)
    want = gradients(model)
    clear(model)
    other = batch(3, 5, seed=4)
    with adv.perturbed(lambda: model(**other).loss):
        model(**other)
    adv.backward(closure)
    assert_gradients(gradients(model), want, 1e-12)


def test_perturbed_refuses_what_backward_refuses() -> None:
    model, data = with_gradients(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings)

    def search(closure: Callable[[], Any], mask: Tensor | None = None) -> None:
        with adv.perturbed(closure, mask=mask):
            pytest.fail("the body must not run")

    refused(model, lambda: search(lambda: None), RuntimeError, "never ran")
    refused(model, lambda: search(lambda: model(data["input_ids"])), TypeError, "labels")
    refused(model, lambda: search(lambda: model(**data), torch.ones(4, 6)), ValueError, "mask", "(4, 6)")
