"""FreeLB, and YOPO where it is the same: where they start, and one pass from zero."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastadv
from tests.support import assert_gradients, gradients, one_step, ready, refused, same_bits, with_gradients

SPLIT = "bert.embeddings"


@pytest.mark.parametrize("method", [fastadv.FreeLB, fastadv.YOPO])
def test_one_pass_from_zero_is_plain_training(method: Any) -> None:
    model, data, _ = ready(dropout=0.2)
    torch.manual_seed(7)
    loss = model(**data).loss
    loss.backward()
    want, state = gradients(model), torch.get_rng_state()
    more = {"split": SPLIT} if method is fastadv.YOPO else {}
    result, found, _ = one_step(model, method, data, steps=1, random_start=0, **more)
    assert_gradients(found, want, 1e-12)
    assert same_bits(result.loss, loss.detach()) and same_bits(result.adv_loss, loss.detach())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fused", [False, None])
@pytest.mark.parametrize("name", ["FreeLB", "YOPO"])
def test_the_start_is_the_public_codes(name: str, fused: bool | None) -> None:
    """l2: U(-1, 1) * magnitude / sqrt(true length * D), masked, outside the ball where that is smaller."""
    model, data, _ = ready()
    more = {"split": SPLIT} if name == "YOPO" else {}
    keep, ids = data["attention_mask"].bool(), data["input_ids"]
    starts = []
    for _ in range(2):
        _, _, seen = one_step(
            model, getattr(fastadv, name), data, random_start=0.8, epsilon=0.1, step_size=0.01, fused=fused, **more
        )
        starts.append((seen[0] - model.word_embeddings.weight[ids]).detach())
    assert same_bits(*starts), "one seed, one start"
    start, last = starts[0], (seen[-1] - model.word_embeddings.weight[ids]).detach()
    bound = 0.8 / (data["attention_mask"].sum(1) * 16).double().sqrt()
    largest = start.abs().flatten(1).amax(1)
    assert (largest <= bound).all() and (largest > 0.9 * bound).all()
    assert not start[~keep].any()
    assert (start.flatten(1).norm(dim=1) > 0.4).all(), "not projected onto the ball of 0.1"
    lengths = last.flatten(1).norm(dim=1)
    assert (lengths < 0.1 + 1e-9).all() and (lengths > 0.09).all(), "an ascent ends inside it"


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"steps": 0}, ValueError, ["steps", "at least 1"]),
        ({"random_start": True}, ValueError, ["random_start", "magnitude"]),
        ({"clean_weight": 0}, TypeError, ["clean_weight"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients()
    refused(model, lambda: fastadv.FreeLB(model, embedding=model.word_embeddings, **options), error, *phrases)
