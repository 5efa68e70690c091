"""SMART, VAT, LLR, AWP and NEFTune against their papers in float64, on a model with attention; and their identities."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastadv
from fastadv import reference
from fastadv.engine.adam import Adam
from fastadv.ops import divergence
from tests.models import TinyModel
from tests.oracles import regularisers as papers
from tests.oracles.setting import EVERYWHERE, MASKED, Setting
from tests.support import assert_close, assert_gradients, batch, clear, gradients, record, seeded


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


def test_llr_by_adam() -> None:
    """Adam's first step is its rate along the sign; a rate above epsilon ends on the ball at once."""
    here = Setting()
    adv = here.make(fastadv.LLR, here.noise * 0.01, epsilon=0.05, optimizer="adam", steps=1)
    with record(here.model) as seen:
        adv.backward(here.losses)
    moved = seen[-1] - here.words.detach()
    assert float(moved.abs().isclose(torch.tensor(0.05).double()).double().mean()) > 0.9
    optimizer = torch.optim.Adam([torch.zeros(3, dtype=torch.float64, requires_grad=True)], lr=0.1, maximize=True)
    [mine] = optimizer.param_groups[0]["params"]
    steps = Adam(0.1)
    total = torch.zeros(3, dtype=torch.float64)
    for _ in range(4):
        mine.grad = torch.randn(3, dtype=torch.float64)
        total = total + steps.step(0, mine.grad)
        optimizer.step()
    assert_close(total, mine, 1e-12, "Adam's steps")


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


@EVERYWHERE
@MASKED
def test_neftune(masked: bool, fused: bool | None) -> None:
    """The gradient at the noise, which is drawn anew in every step and bounded by the true length."""
    here = Setting(masked)
    adv = here.make(fastadv.NEFTune, alpha=3.0, fused=fused)
    plain, before = here.words.detach(), None
    bound = 3.0 / (here.keep.sum((1, 2)) * 16).sqrt()
    for _ in range(2):
        clear(here.model)
        with record(here.model) as seen:
            result = adv.backward(lambda: here.output().loss, mask=here.mask)
        [embedded] = seen
        noise = embedded - plain
        assert (noise.abs().flatten(1).amax(1) <= bound).all()
        assert (noise.abs().flatten(1).amax(1) > 0.9 * bound).all()
        assert not noise[here.keep.expand_as(noise) == 0].any()
        want = papers.gradients_of(here.model, here.loss_at(here.words + noise))
        assert_gradients(gradients(here.model), want, 1e-9)
        assert_close(result.loss, here.loss_at(embedded), 1e-12, "loss")
        assert before is None or not torch.equal(noise, before)
        before = noise
    drawn = reference.neftune.__globals__["noise"](here.keep[..., 0], 16, 3.0)
    assert abs(float(drawn.std() / before.std()) - 1) < 0.1


@EVERYWHERE
@pytest.mark.parametrize("kind", ["symmetric_kl", "kl", "js", "mse"])
def test_smart_at_radius_zero_is_plain_training(kind: str, fused: bool | None) -> None:
    """With dropout too: both passes see the same masks."""
    model, data = seeded(lambda: TinyModel("tfm", dropout=0.3), dtype=torch.float32), batch()
    torch.manual_seed(1)
    model(**data).loss.backward()
    want = gradients(model)
    clear(model)
    adv = fastadv.SMART(model, embedding=model.word_embeddings, epsilon=0.0, divergence=kind, fused=fused)
    torch.manual_seed(1)
    result = adv.backward(lambda: model(**data), mask=data["attention_mask"])
    assert result.adv_loss.item() == 0
    assert_gradients(gradients(model), want, 1e-5, floor=1e-2)


@EVERYWHERE
def test_vat_is_the_kl_half_of_smart(fused: bool | None) -> None:
    """At one perturbation VAT's divergence is one half of SMART's, and its gradient that half's, one side fixed."""
    here = Setting()
    adv = here.make(fastadv.VAT, here.noise * 0.01, epsilon=0.7, fused=fused)
    with record(here.model) as seen:
        vat = adv.backward(lambda: {"logits": here.output().logits})
    found, r = gradients(here.model), seen[-1] - here.words.detach()
    adv.close()

    def half(logits: Tensor, target: Tensor) -> Tensor:
        return divergence(logits, target.detach(), "kl", fused=fused)

    def other(logits: Tensor, target: Tensor) -> Tensor:
        return divergence(target, logits, "kl", fused=fused)

    values = {}
    for name, kind in {"half": half, "other": other, "both": "symmetric_kl"}.items():
        clear(here.model)
        options = {"epsilon": 10.0, "step_size": 0.0, "scope": "sample", "norm": "l2", "divergence": kind}
        smart = here.make(fastadv.SMART, r, fused=fused, **options)
        values[name] = smart.backward(lambda: (0 * here.output().loss, here.output().logits)).adv_loss
        smart.close()
        if name == "half":
            assert_gradients(gradients(here.model), found, 1e-9)
    assert_close(values["half"], vat.adv_loss, 1e-9, "divergence")
    assert_close(values["half"] + values["other"], values["both"], 1e-9, "both halves")


def test_llr_of_a_linear_loss_has_no_gap() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 1)).double()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    adv = fastadv.LLR(model, epsilon=0.3, slope_weight=0.0)
    result = adv.backward(lambda: model(ids)[:, 0])
    assert float(result.adv_loss) < 1e-14


def test_tokens_that_are_padding_do_not_count_in_a_divergence() -> None:
    """Logits [B, T, C]: the mean over the mask's tokens."""
    model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 5)).double()
    data = batch()
    ids, mask = data["input_ids"], data["attention_mask"]

    def closure() -> dict[str, Tensor]:
        logits = model(ids)
        return {"loss": logits[mask.bool()].square().mean(), "logits": logits}

    adv = fastadv.SMART(model, epsilon=0.5)
    with torch.no_grad():
        clean = model(ids)
    seen: list[Tensor] = []
    model.register_forward_hook(lambda *call: seen.append(call[-1].detach()))
    result = adv.backward(closure, mask=mask)
    rows = papers.symmetric_kl(seen[-1][mask.bool()], clean[mask.bool()])
    assert_close(result.adv_loss, rows, 1e-9, "divergence")
    assert torch.equal(seen[-1][mask == 0], clean[mask == 0])
