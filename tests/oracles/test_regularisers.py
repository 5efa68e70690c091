"""SMART, VAT, LLR and AWP against their papers in float64, on a model with attention."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastadv
from fastadv import reference
from tests.oracles import regularisers as papers
from tests.oracles.setting import EVERYWHERE, MASKED, Setting
from tests.support import assert_close, assert_gradients, batch, clear, gradients


@EVERYWHERE
@MASKED
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(("norm", "scope"), list(itertools.product(["linf", "l2"], ["token", "sample", "batch"])))
def test_smart(norm: str, scope: str, steps: int, masked: bool, fused: bool | None) -> None:
    here, start = Setting(masked), None
    epsilon = 0.1 if norm == "linf" else 0.5
    numbers = {"epsilon": epsilon, "step_size": epsilon / 2, "steps": steps, "weight": 2.5}
    start = here.noise * epsilon / 10
    where = {"norm": norm, "scope": scope}
    want = papers.smart(here.model, here.loss_at, here.answer_at, here.words, start, keep=here.keep, **numbers, **where)
    adv = here.make(fastadv.SMART, start, fused=fused, **numbers, **where)
    result = here.check(adv, here.output, want, 2 + steps)
    assert_close(result.loss, here.output().loss, 1e-12, "loss")
    if (norm, scope) == ("linf", "token") and not masked:
        clear(here.model)
        reference.smart(here.pair, here.model.word_embeddings, start, **numbers)
        assert_gradients(gradients(here.model), want.gradients, 1e-9)


@EVERYWHERE
def test_smart_of_a_regression(fused: bool | None) -> None:
    here = Setting(classes=1)
    numbers = {"epsilon": 0.1, "step_size": 0.05, "steps": 2, "weight": 1.0}
    want = papers.smart(
        here.model,
        here.loss_at,
        here.answer_at,
        here.words,
        here.noise * 0.01,
        keep=here.keep,
        distance=papers.mse,
        **numbers,
    )
    adv = here.make(fastadv.SMART, here.noise * 0.01, divergence="mse", fused=fused, **numbers)
    here.check(adv, here.output, want, 4)


@EVERYWHERE
@MASKED
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("scope", ["sample", "token", "batch"])
def test_vat(scope: str, steps: int, labelled: bool, masked: bool, fused: bool | None) -> None:
    here = Setting(masked)
    numbers = {"epsilon": 0.7, "xi": 0.05, "steps": steps, "weight": 1.5}
    start = here.noise * 0.01
    want = papers.vat(
        here.model,
        here.loss_at if labelled else None,
        here.answer_at,
        here.words,
        start,
        keep=here.keep,
        scope=scope,
        **numbers,
    )
    adv = here.make(fastadv.VAT, start, scope=scope, fused=fused, **numbers)

    def closure() -> Any:
        return here.output() if labelled else {"logits": here.output().logits}

    result = here.check(adv, closure, want, 2 + steps)
    if labelled:
        assert_close(result.loss, here.output().loss, 1e-12, "loss")
    else:
        assert_close(result.loss, 1.5 * result.adv_loss, 1e-12, "loss")
    if scope == "sample" and not masked:
        clear(here.model)
        reference.vat(
            here.pair if labelled else lambda: (None, here.output().logits),
            here.model.word_embeddings,
            start,
            **numbers,
        )
        assert_gradients(gradients(here.model), want.gradients, 1e-9)


def test_vat_of_a_mixed_batch() -> None:
    """The loss is that of the labelled half, the divergence that of all."""
    here = Setting()
    start = here.noise * 0.01

    def loss_at(words: Tensor) -> Tensor:
        return F.cross_entropy(here.answer_at(words)[:2], here.labels[:2])

    def closure() -> tuple[Tensor, Tensor]:
        logits = here.output().logits
        return F.cross_entropy(logits[:2], here.labels[:2]), logits

    numbers = {"epsilon": 0.7, "xi": 0.05, "steps": 1, "weight": 1.0}
    want = papers.vat(here.model, loss_at, here.answer_at, here.words, start, keep=here.keep, **numbers)
    here.check(here.make(fastadv.VAT, start, **numbers), closure, want, 3)


@EVERYWHERE
@MASKED
@pytest.mark.parametrize("stop_gradient", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_llr(steps: int, stop_gradient: bool, masked: bool, fused: bool | None) -> None:
    here = Setting(masked)
    numbers = {"epsilon": 0.1, "step_size": 0.03, "steps": steps, "gap_weight": 4.0, "slope_weight": 3.0}
    start = here.noise * 0.05
    want = papers.llr(
        here.model, here.losses_at, here.words, start, keep=here.keep, stop_gradient=stop_gradient, **numbers
    )
    adv = here.make(fastadv.LLR, start, stop_gradient=stop_gradient, fused=fused, **numbers)
    result = here.check(adv, here.losses, want, 2 + steps)
    assert_close(result.loss, here.losses().mean(), 1e-12, "loss")
    if not masked and not stop_gradient:
        clear(here.model)
        reference.llr(here.losses, here.model.word_embeddings, start, **numbers)
        assert_gradients(gradients(here.model), want.gradients, 1e-9)


def test_llr_of_a_mean_is_one_sample() -> None:
    """Where the closure returns the mean alone; an output with `losses` gives each sample's own."""
    here = Setting()
    start = here.noise * 0.05
    numbers = {"epsilon": 0.1, "step_size": 0.03, "steps": 1, "gap_weight": 4.0, "slope_weight": 3.0}

    def mean_at(words: Tensor) -> Tensor:
        return here.losses_at(words).mean().reshape(1)

    def along_all(words: Tensor) -> Tensor:
        return words.flatten(0, 1).unsqueeze(0)

    def whole(words: Tensor) -> Tensor:
        return mean_at(words.view_as(here.words))

    want = papers.llr(here.model, whole, along_all(here.words), along_all(start), keep=along_all(here.keep), **numbers)
    adv = here.make(fastadv.LLR, start, **numbers)
    result = adv.backward(lambda: here.output().loss)
    assert_gradients(gradients(here.model), want.gradients, 1e-9)
    assert_close(result.adv_loss, want.penalty, 1e-9, "penalty")
    clear(here.model)
    each = papers.llr(here.model, here.losses_at, here.words, start, keep=here.keep, **numbers)
    adv.backward(lambda: {"loss": here.output().loss, "losses": here.losses()})
    assert_gradients(gradients(here.model), each.gradients, 1e-9)


@EVERYWHERE
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize(("clean_weight", "adv_weight"), [(1.0, 1.0), (0.0, 1.0), (0.5, 2.0)])
def test_awp(clean_weight: float, adv_weight: float, steps: int, accumulated: bool, fused: bool | None) -> None:
    """Gradients that are there before have no part in the direction."""
    here = Setting()
    numbers = {"gamma": 0.05, "steps": steps, "clean_weight": clean_weight, "adv_weight": adv_weight}
    want = papers.awp(here.model, lambda: here.output().loss, **numbers)
    before = {name: p.detach().clone() for name, p in here.model.named_parameters()}
    if accumulated:
        here.model(batch(seed=9)["input_ids"], None, here.labels).loss.backward()
        want = {name: grad + want[name] for name, grad in gradients(here.model).items()}
    adv = here.make(fastadv.AWP, fused=fused, **numbers)
    result = adv.backward(lambda: here.output().loss)
    assert_gradients(gradients(here.model), want, 1e-9)
    assert all(torch.equal(p, before[name]) for name, p in here.model.named_parameters())
    assert bool(result.adv_loss > here.output().loss)
    assert float(adv.perturbation_norm) > 0
