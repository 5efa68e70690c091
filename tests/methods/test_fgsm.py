"""FGSM: one step along the sign, from zero or from a start that is uniform in its ball."""

from __future__ import annotations

from typing import Any

import pytest

import fastadv
from tests.oracles import oracles
from tests.support import batch, one_step, ready, refused, same_bits, with_gradients


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_fgsm_is_one_step_of_pgd_along_the_sign(scope: str, clean_weight: float) -> None:
    model, data, _ = ready()
    common = {"scope": scope, "clean_weight": clean_weight, "epsilon": 0.05}
    _, want, saw = one_step(model, fastadv.PGD, data, norm="linf", steps=1, step_size=0.05, **common)
    _, found, seen = one_step(model, fastadv.FGSM, data, **common)
    assert all(same_bits(mine, its) for mine, its in zip(seen, saw, strict=True))
    assert all(same_bits(found[name], want[name]) for name in want)


def test_the_start_of_fgsm_is_uniform_in_its_ball() -> None:
    model, data = ready()[0], batch(rows=4, length=7)
    _, _, seen = one_step(model, fastadv.FGSM, data, epsilon=0.05, random_start=True, clean_weight=0)
    start = (seen[0] - model.word_embeddings.weight[data["input_ids"]]).detach()[data["attention_mask"].bool()]
    assert 0.049 < start.abs().max() <= 0.05
    assert abs(float(start.mean())) < 0.01
    end = (seen[1] - model.word_embeddings.weight[data["input_ids"]]).detach()[data["attention_mask"].bool()]
    at_rim = (end.abs() > 0.05 * (1 - 1e-9)).double().mean()
    assert abs(float(at_rim) - 0.625) < 0.05, "a step of 1.25 epsilon reaches the rim from 5/8 of the starts"


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"epsilon": None}, ValueError, ["FGSM", "epsilon"]),
        ({"norm": "l2"}, ValueError, ["norm", "'linf'"]),
        ({"epsilon": "1", "random_start": True}, TypeError, ["epsilon", "number"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients()
    refused(model, lambda: fastadv.FGSM(model, embedding=model.word_embeddings, **options), error, *phrases)
