"""clamp="batch": perturbed activations stay in the range of the clean batch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from tests.models import TinyModel
from tests.oracles.oracles import ascend
from tests.oracles.setting import EVERYWHERE, Setting
from tests.support import assert_close, batch, refused, seeded

RULE: dict[str, Any] = {"epsilon": 3.0, "step_size": 2.0}


def clamped(delta: Tensor, x: Tensor) -> Tensor:
    return (x + delta).clamp(x.min(), x.max()) - x


@EVERYWHERE
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
def test_embeddings(masked: bool, fused: bool | None) -> None:
    """After each ball, in float64; far enough that most elements reach the edge."""
    here = Setting(masked)
    adv = here.make(fastadv.PGD, scope="sample", clamp="batch", steps=3, fused=fused, **RULE)
    [found] = adv.find(here.output, mask=here.mask).values
    x, r = here.words.detach(), torch.zeros_like(here.noise)
    for _ in range(3):
        at = (x + here.keep * r).requires_grad_()
        [g] = torch.autograd.grad(here.loss_at(at), at)
        r = clamped(ascend(r, g * here.keep, scope="sample", norm="l2", **RULE), x)
    assert_close(found, r, 1e-9, "perturbation")
    assert ((x + r == x.min()) | (x + r == x.max())).any()
    assert (found[here.keep[..., 0] == 0] == 0).all()


@EVERYWHERE
def test_another_modules_output(fused: bool | None) -> None:
    """Of a layer, whose clean outputs are those of the last pass; and adam's step is followed by it as well."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    seen: list[Tensor] = []
    handle = model.bert.ff1.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    model(**data)
    handle.remove()
    [x] = seen
    for direction in ("sign", "adam"):
        with fastadv.PGD(
            model, scope="token", direction=direction, ball=None, step_size=50.0, clamp="batch", embedding="ff1",
            steps=2, fused=fused,
        ) as adv:  # fmt: skip
            [found] = adv.find(lambda: model(**data)).values
        reached = x + found
        assert float(reached.min()) >= float(x.min()) - 1e-12
        assert float(reached.max()) <= float(x.max()) + 1e-12
        edge = torch.minimum((reached - x.min()).abs(), (reached - x.max()).abs())
        assert float((edge < 1e-12).double().mean()) > 0.1  # of all positions, of which the first alone is read


def test_steps_of_a_methods_own_are_clamped_too() -> None:
    here = Setting()
    adv = here.make(fastadv.SMART, scope="token", update="mt-dnn", clamp="batch")
    [found] = adv.find(here.output).values
    reached, x = here.words.detach() + found, here.words.detach()
    assert float(found.norm()) > 0
    assert float(reached.min()) >= float(x.min()) - 1e-12
    assert float(reached.max()) <= float(x.max()) + 1e-12


def test_rounds_in_the_models_dtype() -> None:
    """bfloat16: what the model sees stays in the range, since a bound that is a bfloat16 is met exactly."""
    model, data = seeded(TinyModel, dtype=torch.bfloat16), batch()
    with fastadv.PGD(
        model, scope="token", direction="sign", ball=None, step_size=9.0, clamp="batch", embedding="word_embeddings"
    ) as adv:
        [found] = adv.find(lambda: model(**data)).values
    x = model.word_embeddings(data["input_ids"]).detach()
    seen = (x.float() + found).bfloat16()
    assert seen.min() == x.min() and seen.max() == x.max()


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "row", "embedding": "word_embeddings"},
        {"scope": "sample", "embedding": ["word_embeddings", "classifier"]},
    ],
    ids=["table", "several"],
)
def test_refuses(options: dict[str, Any]) -> None:
    model = seeded(TinyModel)
    refused(model, lambda: fastadv.PGD(model, clamp="batch", **options), ValueError, "the range of one module")


def test_refuses_another_word() -> None:
    model = seeded(TinyModel)
    refused(
        model,
        lambda: fastadv.PGD(model, clamp="sample", scope="token", embedding="word_embeddings"),
        ValueError,
        "clamp must be one of",
    )
