"""FGM: one step of PGD, as long as its ball is wide."""

from __future__ import annotations

from typing import Any

import pytest

import fastadv
from tests.oracles import oracles
from tests.support import one_step, ready, refused, same_bits, with_gradients


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_fgm_is_one_step_of_pgd(scope: str, norm: str, clean_weight: float) -> None:
    model, data, _ = ready()
    common = {"scope": scope, "norm": norm, "clean_weight": clean_weight, "epsilon": 0.3}
    _, want, saw = one_step(model, fastadv.PGD, data, steps=1, step_size=0.3, **common)
    _, found, seen = one_step(model, fastadv.FGM, data, **common)
    assert all(same_bits(mine, its) for mine, its in zip(seen, saw, strict=True))
    assert all(same_bits(found[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"epsilon": None}, ValueError, ["FGM", "epsilon"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients()
    refused(model, lambda: fastadv.FGM(model, embedding=model.word_embeddings, **options), error, *phrases)
