"""VAT: one half of SMART's divergence, batches without labels, how far it looks, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.ops import divergence
from tests.oracles.setting import EVERYWHERE, Setting
from tests.support import assert_close, assert_gradients, clear, gradients, ready, record, refused, with_gradients


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


def test_vat_looks_at_a_plain_step_without_labels() -> None:
    """Before `start_step`: nothing to train, and no complaint."""
    model, data, _ = ready()
    adv = fastadv.VAT(model, embedding=model.word_embeddings, start_step=1)
    result = adv.backward(lambda: {"logits": model(data["input_ids"]).logits})
    assert (result.loss.item(), result.adv_loss) == (0.0, None)
    assert all(p.grad is None for p in model.parameters())
    assert adv.backward(lambda: {"logits": model(data["input_ids"]).logits}).adv_loss > 0


def test_vat_looks_as_far_as_under_autocast() -> None:
    model, _, _ = ready(torch.float32)
    dtypes = (None, torch.bfloat16)
    makes = {dtype: fastadv.VAT(model, embedding="word_embeddings", probe_dtype=dtype) for dtype in dtypes}
    assert [adv.xi for adv in makes.values()] == [0.01, 1.0]


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"xi": 0.0}, ValueError, ["xi", "above 0"]),
        ({"random_start": False}, ValueError, ["random start", "no gradient"]),
        ({"divergence": 3}, ValueError, ["divergence"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients("tfm")
    refused(model, lambda: fastadv.VAT(model, embedding=model.word_embeddings, **options), error, *phrases)
