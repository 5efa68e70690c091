"""Searches by moments, whole methods in float64: torch.optim on the perturbation itself, then the ball."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.arguments.rule import MOMENT_DIRECTIONS
from tests.models import TinyModel
from tests.ops.test_moment_step import OPTIMIZERS
from tests.oracles.oracles import TABLE_SCOPES, norm2
from tests.oracles.setting import EVERYWHERE, Setting
from tests.support import assert_close, assert_gradients, batch, clear, gradients, record, refused, seeded, two_calls

RADIUS, RATE, STEPS = 0.2, 0.05, 4


def oracle(here: Setting, scope: str, direction: str, ball: str | None, steps: int = STEPS) -> Tensor:
    """What the search finds: [B, T, D], or [V, D] in table scopes."""
    table = here.model.word_embeddings.weight.detach()
    words = table[here.ids]
    r = torch.zeros_like(table if scope in TABLE_SCOPES else words).requires_grad_()
    optimizer = OPTIMIZERS[direction]([r], lr=RATE, maximize=True)
    for _ in range(steps):
        moved = words + here.keep * (r[here.ids] if scope in TABLE_SCOPES else r)
        [r.grad] = torch.autograd.grad(here.loss_at(moved), r)
        optimizer.step()
        with torch.no_grad():
            if ball == "l2":
                size = norm2(r, scope)
                r.copy_(torch.where(size > RADIUS, r * RADIUS / size, r))
            elif ball == "linf":
                r.clamp_(-RADIUS, RADIUS)
    return r.detach()


@EVERYWHERE
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("scope", ["table", "row", "batch", "sample", "token"])
@pytest.mark.parametrize("direction", MOMENT_DIRECTIONS)
def test_pgd(direction: Any, scope: Any, masked: bool, fused: bool | None) -> None:
    """The perturbation in every ball, and the gradient that trains."""
    for ball in ("l2", "linf", None):
        here = Setting(masked)
        adv = here.make(
            fastadv.PGD, epsilon=RADIUS, step_size=RATE, steps=STEPS, scope=scope, direction=direction, ball=ball,
            clean_weight=0.0, fused=fused,
        )  # fmt: skip
        want = oracle(here, scope, direction, ball)
        table = here.model.word_embeddings.weight
        at = table[here.ids].detach() + here.keep * (want[here.ids] if scope in TABLE_SCOPES else want)
        clear(here.model)
        loss = here.loss_at(table[here.ids] + (at - table[here.ids].detach()))
        loss.backward()
        expected = gradients(here.model)
        clear(here.model)
        for _ in range(2):  # moments are a search's: the second step is like the first
            clear(here.model)
            with record(here.model) as seen:
                result = adv.backward(lambda here=here: here.output(), mask=here.mask)
            assert_close(result.adv_loss, loss, 1e-11, "loss")
            assert_close(seen[-1], at, 1e-9, "what the last pass sees")
            assert_gradients(gradients(here.model), expected, 1e-9)
        assert int(adv.skipped) == 0
        adv.close()


@EVERYWHERE
def test_the_gradient_that_trains_is_the_one_that_freelb_follows(fused: bool | None) -> None:
    """K passes, K - 1 steps: moments see each pass's gradient, as it counts: a third of it, beside Adam's guard."""
    here = Setting()
    adv = here.make(
        fastadv.FreeLB, epsilon=RADIUS, step_size=RATE, steps=3, random_start=False, direction="adam", fused=fused
    )
    clear(here.model)
    adv.backward(here.output)
    got = gradients(here.model)
    clear(here.model)
    for steps in range(3):
        r = oracle(here, "sample", "adam", "l2", steps)
        (here.loss_at(here.words + r) / 3).backward()
    assert_gradients(got, gradients(here.model), 1e-5)


@EVERYWHERE
def test_two_calls_have_moments_of_their_own(fused: bool | None) -> None:
    """A model that looks words up twice: each call by itself, with one count."""
    model, args = two_calls()
    options = {"scope": "sample", "direction": "adamw", "step_size": RATE, "epsilon": None, "fused": fused}
    with fastadv.PGD(model, steps=3, **options) as adv:
        found = adv.find(lambda: model(*args)).values
    assert len(found) == 2
    with fastadv.PGD(model, steps=1, **options) as adv:
        first = adv.find(lambda: model(*args)).values
    assert [tuple(one.shape) for one in found] == [tuple(one.shape) for one in first]
    for one in first:
        moved = one[one != 0]
        assert_close(moved.abs(), torch.full_like(moved, RATE), 1e-2, "a first step is the rate along the sign")


@EVERYWHERE
def test_documents_step_apart(fused: bool | None) -> None:
    """In packed rows each document has a ball of its own, and one that is not finite stays and is counted."""
    model, data = seeded(TinyModel), batch(2, 6)
    groups = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, -1]])
    options: dict[str, Any] = {"direction": "adam", "scope": "sample", "step_size": RATE, "epsilon": 0.1, "steps": 3}
    with fastadv.PGD(model, embedding="word_embeddings", fused=fused, **options) as adv:
        [found] = adv.find(lambda: model(**data), groups=groups).values
        for row, number in itertools.product(range(2), range(3)):
            own = found[row][groups[row] == number]
            assert own.numel() == 0 or float(own.norm()) <= 0.1 + 1e-9
        assert (found[groups < 0] == 0).all()
        assert int(adv.skipped) == 0


@EVERYWHERE
@pytest.mark.parametrize("scope", ["sample", "row"])
def test_a_group_that_is_not_finite_is_counted_and_stays(scope: Any, fused: bool | None) -> None:
    model, data = seeded(TinyModel), batch()

    def closure() -> Tensor:
        loss: Tensor = model(**data).loss
        return loss * torch.inf

    with fastadv.PGD(
        model, scope=scope, direction="adam", steps=2, embedding="word_embeddings", fused=fused
    ) as adv:  # fmt: skip
        [found] = adv.find(closure).values
        assert (found == 0).all()
        assert int(adv.skipped) > 0


class Restarts(fastadv.PGD):
    """Two searches in one step, of which the second counts."""

    def search(self, step: Any) -> None:
        for _ in range(2):
            step.start()
            super().search(step)


def test_a_new_start_is_a_new_search() -> None:
    found = []
    for method in (fastadv.PGD, Restarts):
        here = Setting()
        adv = here.make(method, here.noise * 0.01, direction="adam", scope="sample", steps=3, step_size=RATE)
        found.append(adv.find(here.output).values[0])
    assert torch.equal(*found)


def test_one_step_goes_the_rate_along_the_sign() -> None:
    """Where no ball holds it, and the gradient is no smaller than Adam's guard."""
    here = Setting()
    adv = here.make(fastadv.FGM, epsilon=0.1, scope="sample", direction="adam", ball=None)
    [found] = adv.find(here.output).values
    assert_close(found.abs().median(), torch.tensor(0.1), 1e-3, "step")


def test_moments_are_lent_from_step_to_step() -> None:
    """In the same memory, which a captured graph must keep."""
    here = Setting()
    for scope in ("token", "row"):
        adv = here.make(fastadv.PGD, scope=scope, direction="adamw", steps=2)
        adv.find(here.output)
        before = {tensor.data_ptr() for tensor in adv._memory()}
        adv.find(here.output)
        assert before == {tensor.data_ptr() for tensor in adv._memory()}
        lookups, rows = adv._engine.buffers.lookups, adv._engine.buffers.moments.memory
        kept = rows if scope == "row" else lookups[0].moments
        assert kept is not None and kept.data_ptr() in before
        assert (kept != 0).any()
        adv.close()


@pytest.mark.parametrize(
    ("make", "phrase"),
    [
        (lambda m: fastadv.FreeAT(m, direction="adam"), "begins anew with each replay"),
        (lambda m: fastadv.VAT(m, direction="rmsprop"), "no direction of a power iteration"),
        (lambda m: fastadv.PGD(m, direction="adamw", tied="both"), "keeps no moments of"),
        (lambda m: fastadv.PGD(m, direction="adagrad"), "'l2', 'sign', 'max', 'adam', 'adamw', 'rmsprop'"),
    ],
    ids=["freeat", "vat", "tied", "unknown"],
)
def test_refuses(make: Any, phrase: str) -> None:
    model = seeded(TinyModel)
    refused(model, lambda: make(model), ValueError, phrase)


def test_the_classic_calls_have_no_moments() -> None:
    model = seeded(TinyModel)
    pgd = fastadv.PGD(model, embedding="word_embeddings", direction="adam", emb_name="word_embeddings")
    model(**batch()).loss.backward()
    refused(model, lambda: pgd.attack(is_first_attack=True), ValueError, "direction must be one of l2, sign, max")
