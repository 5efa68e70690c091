"""PGD: its random start, its probes under a scaler, and the arguments that it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from tests.bert import text, tiny_bert
from tests.models import TinyModel
from tests.oracles import oracles
from tests.support import assert_close, batch, gradients, ready, record, refused, same_bits, seeded, with_gradients


@pytest.mark.parametrize("scope", ["table", "sample"])
def test_a_random_start_is_about_as_long_as_it_says(scope: str) -> None:
    """Its norm, over the table or a sample, is near magnitude / sqrt(3): the mean square of U(-1, 1) is 1/3."""
    model, data = seeded(lambda: TinyModel("tfm")), batch(8, 12)
    ids, weight = data["input_ids"], model.word_embeddings.weight.detach()
    adv = fastadv.PGD(model, embedding="word_embeddings", scope=scope, random_start=True, epsilon=2.0, clean_weight=0)
    with record(model) as seen:
        adv.backward(lambda: model(ids, labels=data["labels"]).loss)
    first = seen[0] - weight[ids]
    if scope == "table":
        first = torch.zeros_like(weight).index_put_((ids,), first)
    assert_close(oracles.norm2(first, scope).mean(), torch.tensor(2.0 / 3**0.5).double(), 0.1, "norm of the start")


@pytest.mark.parametrize("dropout", ["fresh", "same", "off"])
@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("scope", ["table", "sample"])
@pytest.mark.parametrize("rate", [0.0, 0.2])
def test_every_step_starts_elsewhere(rate: float, scope: str, clean_weight: float, dropout: str) -> None:
    """A random start that came out the same each step would be no random start."""
    net, data = tiny_bert(dropout=rate), text()
    starts = []

    def start(shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
        starts.append(0.1 * torch.rand(shape))
        return starts[-1]

    adv = fastadv.PGD(net, steps=2, random_start=start, scope=scope, clean_weight=clean_weight, dropout=dropout)
    for _ in range(3):
        adv.backward(lambda: net(**data), mask=data["attention_mask"])
    assert len(starts) == 3
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
def test_a_random_start_repeats_with_the_seed(clean_weight: float) -> None:
    data, found = text(), []
    for _ in range(2):
        net = tiny_bert(dropout=0.2)
        adv = fastadv.PGD(net, random_start=True, scope="sample", clean_weight=clean_weight)
        torch.manual_seed(5)
        adv.backward(lambda net=net: net(**data), mask=data["attention_mask"])
        found.append(gradients(net))
    for name, grad in found[0].items():
        assert same_bits(grad, found[1][name]), name


@pytest.mark.parametrize("returned", [torch.zeros(4, 7), None, torch.zeros(1, 7, 16)], ids=["2d", "none", "broadcast"])
def test_a_random_start_of_another_shape(returned: Any) -> None:
    model, data = with_gradients(), batch()
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope="sample", random_start=lambda shape, mask: returned)
    refused(model, lambda: adv.backward(lambda: model(**data)), ValueError, "random_start", "(4, 7, 16)")


def test_a_scaler_reaches_the_probes() -> None:
    """The loss's gradient is below what float32 holds: only a scaled probe sees a direction."""
    model, _, closure = ready(torch.float32)
    adv = fastadv.PGD(
        model,
        embedding=model.word_embeddings,
        scope="sample",
        clean_weight=0,
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**100),
    )
    adv.backward(lambda: closure().loss * 2.0**-149)
    assert float(adv.perturbation_norm) > 0.5


NUMBERS = [
    pytest.param({"step_size": -0.3}, ValueError, ["step_size", "at least 0"], id="step-size-negative"),
    pytest.param({"step_size": math.nan}, ValueError, ["step_size", "finite"], id="step-size-nan"),
    pytest.param({"step_size": math.inf}, ValueError, ["step_size", "finite"], id="step-size-inf"),
    pytest.param({"step_size": None}, TypeError, ["step_size", "number"], id="step-size-none"),
    pytest.param({"steps": 0}, ValueError, ["steps", "at least 1"], id="steps-0"),
    pytest.param({"steps": -2}, ValueError, ["steps", "at least 1"], id="steps-negative"),
    pytest.param({"steps": 2.5}, TypeError, ["steps", "whole number"], id="steps-float"),
    pytest.param({"steps": True}, TypeError, ["steps", "whole number"], id="steps-bool"),
    pytest.param(
        {"random_start": True, "epsilon": None},
        ValueError,
        ["random_start", "epsilon", "magnitude"],
        id="start-no-ball",
    ),
]


@pytest.mark.parametrize(("options", "error", "phrases"), NUMBERS)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients()
    refused(model, lambda: fastadv.PGD(model, embedding=model.word_embeddings, **options), error, *phrases)
