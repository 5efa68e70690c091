"""SMART: plain training at radius zero, tokens that are padding, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.methods.smart import UPDATES
from tests.models import TinyModel
from tests.oracles import regularisers as papers
from tests.oracles.setting import EVERYWHERE
from tests.support import assert_close, assert_gradients, batch, clear, gradients, refused, seeded, with_gradients


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


def test_a_step_by_the_gradients_size_and_a_scaler_do_not_go_together() -> None:
    model, data = with_gradients("tfm"), batch()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    adv = fastadv.SMART(model, embedding=model.word_embeddings, update="mt-dnn", scaler=scaler)
    refused(model, lambda: adv.backward(lambda: model(**data)), ValueError, "GradScaler", "'paper'")


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"update": "code"}, ValueError, ["update", *map(repr, UPDATES)]),
        ({"divergence": "l2"}, ValueError, ["divergence", "'symmetric_kl'"]),
        ({"search": "l2"}, ValueError, ["search", "'symmetric_kl'"]),
        ({"weight": -1}, ValueError, ["weight", "at least 0"]),
        ({"epsilon": None}, TypeError, ["epsilon", "number"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients("tfm")
    refused(model, lambda: fastadv.SMART(model, embedding=model.word_embeddings, **options), error, *phrases)
