"""Autocast and low precision. Around the whole step, not in the closure: the casts that autocast keeps are no older
than the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastadv
from tests.every import EVERY, HOLDING
from tests.models import TiedLM, TinyModel
from tests.support import assert_gradients, batch, gradients, same_bits, seeded

MAKES: dict[str, Callable[..., fastadv.Method]] = {
    **EVERY,
    "awp": lambda model, embedding: fastadv.AWP(model, gamma=0.3),
    "awp, clamped": lambda model, embedding: fastadv.AWP(model, gamma=0.3, epsilon=0.2),
    "bregman": lambda model, embedding: fastadv.BregmanProximal(
        model, decay=0.9, method=fastadv.FGM(model, embedding=embedding)
    ),
}
MOVING = {
    "awp": lambda model: fastadv.AWP(model, gamma=0.3),
    "fgm": partial(fastadv.FGM, tied="both", embedding="embed"),
    "pgd": partial(fastadv.PGD, tied="both", embedding="embed"),
}


@pytest.mark.parametrize("name", MAKES)
def test_a_step_inside_of_autocast(name: str) -> None:
    """Is the step whose closure enters autocast by itself."""
    found = []
    for outside in (False, True):
        model, data = seeded(lambda: TinyModel("tfm"), dtype=torch.float32), batch()
        adv = MAKES[name](model, embedding="word_embeddings")

        def closure() -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return model(**data)  # noqa: B023

        with torch.autocast("cpu", torch.bfloat16) if outside else contextlib.nullcontext():
            adv.backward(closure)
        found.append(gradients(model))
    one_backward_of_two_forwards = name in ("smart", "llr")  # which share a cast: their gradients meet in bfloat16
    assert_gradients(found[1], found[0], 5e-3 if one_backward_of_two_forwards else 1e-6)


@pytest.mark.parametrize("name", MOVING)
def test_moved_weights_are_seen_and_so_is_their_return(name: str) -> None:
    """Autocast keeps its casts by tensor, and does not notice that one was written to."""
    model, ids = seeded(TiedLM, dtype=torch.float32), batch()["input_ids"]
    adv = MOVING[name](model)

    def loss() -> float:
        return float(model(ids).loss.detach())

    with torch.autocast("cpu", torch.bfloat16):
        clean = loss()
        with adv.perturbed(lambda: model(ids).loss):
            kept = loss()
            torch.clear_autocast_cache()
            assert loss() == kept > clean
        assert loss() == clean
        result = adv.backward(lambda: model(ids).loss)
        assert loss() == clean
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        twin = MOVING[name](model).backward(lambda: model(ids).loss)
    assert float(result.adv_loss) == float(twin.adv_loss)


@pytest.mark.parametrize("name", [*HOLDING, "neftune", "awp", "bregman"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_low_precision_and_autocast(name: str, dtype: torch.dtype) -> None:
    """Finite, near float64's, and repeatable with dropout."""
    makes = {
        **HOLDING,
        "neftune": fastadv.NEFTune,
        "awp": lambda model, embedding: fastadv.AWP(model),
        "bregman": lambda model, embedding: fastadv.BregmanProximal(
            model, decay=0.9, method=fastadv.SMART(model, embedding=embedding)
        ),
    }
    found = []
    for _ in range(2):
        model, data = seeded(lambda: TinyModel("tfm", dropout=0.1), dtype=dtype), batch()
        adv = makes[name](model, embedding="word_embeddings")
        torch.manual_seed(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            result = adv.backward(lambda: model(**data))  # noqa: B023
        assert result.loss.isfinite()
        assert result.adv_loss.isfinite()
        found.append(gradients(model))
        assert all(grad.isfinite().all() for grad in found[-1].values())
    assert all(same_bits(found[0][key], found[1][key]) for key in found[0])
