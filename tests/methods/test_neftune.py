"""NEFTune: the gradient at a noise that is drawn in every step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastadv
from fastadv import reference
from tests.oracles import regularisers as papers
from tests.oracles.setting import EVERYWHERE, MASKED, Setting
from tests.support import assert_close, assert_gradients, clear, gradients, record, refused, with_gradients


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


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"alpha": -5.0}, ValueError, ["alpha", "at least 0"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients("tfm")
    refused(model, lambda: fastadv.NEFTune(model, embedding=model.word_embeddings, **options), error, *phrases)
