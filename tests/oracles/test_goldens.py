"""The recorded runs of public implementations are met: see tests/goldens/README.md."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv import reference
from tests.models import TinyModel, TinyRoberta
from tests.oracles.recorded import ENGINES, FGM_ZHIHU, PGD_ZHIHU, Watched, check_zhihu, hyperparameters, load, zhihu
from tests.support import assert_close, assert_gradients, gradients, record


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", FGM_ZHIHU + PGD_ZHIHU)
def test_classic_scripts(name: str, fused: bool | None, masked: bool) -> None:
    """Table scope: clean + adversarial gradient. Padding has no gradient here, so the mask makes no difference."""
    model, run, watched = zhihu(name)
    method = fastadv.FGM if name.startswith("fgm") else fastadv.PGD
    adv = method(model, embedding=model.word_embeddings, fused=fused, **hyperparameters(name))
    with record(model) as seen:
        result = adv.backward(watched, mask=run["mask"] if masked else None)
    check_zhihu(model, run, watched, seen)
    assert_close(result.loss, run["loss_clean"], 1e-7, "loss")
    assert_close(result.adv_loss, run["loss_adv"].reshape(-1)[-1], 1e-7, "adv_loss")


@pytest.mark.parametrize("name", FGM_ZHIHU + PGD_ZHIHU)
def test_the_reference_meets_the_classic_scripts(name: str) -> None:
    model, run, watched = zhihu(name)
    before = model.word_embeddings.weight.detach().clone()
    call = reference.fgm if name.startswith("fgm") else reference.pgd
    with record(model) as seen:
        call(model, watched, model.word_embeddings, **hyperparameters(name))
    check_zhihu(model, run, watched, seen)
    assert torch.equal(model.word_embeddings.weight, before)


@pytest.mark.parametrize("fused", ENGINES)
def test_miyato(fused: bool | None) -> None:
    """Sample scope, the adversarial gradient alone. float32; its norm has 1e-6 under the root, hence 2e-4."""
    model, run = load("fgm_miyato_tf_eps1", TinyModel, torch.float32)
    adv = fastadv.FGM(model, epsilon=1.0, scope="sample", clean_weight=0, embedding=model.word_embeddings, fused=fused)
    watched = Watched(lambda: model(run["ids"], run["mask"], run["labels"]).loss)
    with record(model) as seen:
        result = adv.backward(watched, mask=run["mask"])
    assert_gradients(gradients(model), run["g"], 2e-4)
    want = torch.stack([run["loss_clean"], run["loss_adv"]])
    assert_close(torch.stack(watched.losses), want, 2e-4, "losses")
    assert_close(result.adv_loss, run["loss_adv"], 2e-4, "adv_loss")
    plain = run["w"]["bert.embeddings.word_embeddings.weight"][run["ids"]]
    assert len(seen) == 2
    for embedded, noise in zip(seen, run["noise"], strict=True):
        assert_close(embedded - plain, noise, 2e-4, "perturbation")


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "padding_idx"])
@pytest.mark.parametrize("fused", ENGINES)
def test_freelb_repository(fused: bool | None, masked: bool) -> None:
    """Sample scope, a random start, K probes, the last gradient alone; the mask given, or that of `padding_idx`."""
    model, run = load("pgd_freelbrepo_K3_max0.15", TinyRoberta)
    starts = []

    def start(shape: torch.Size, mask: Tensor | None) -> Tensor:
        starts.append((tuple(shape), mask))
        return run["delta"][0]

    adv = fastadv.PGD(
        model,
        epsilon=0.15,
        step_size=0.1,
        steps=3,
        scope="sample",
        clean_weight=0,
        random_start=start,
        embedding=model.word_embeddings,
        fused=fused,
    )
    watched = Watched(lambda: model(run["ids"], labels=run["labels"]).loss)
    with record(model) as seen:
        result = adv.backward(watched, mask=run["mask"] if masked else None)
    [(shape, mask)] = starts
    assert shape == tuple(run["delta"][0].shape)
    assert mask is not None
    assert torch.equal(mask.reshape(run["mask"].shape).bool(), run["mask"].bool())
    assert_gradients(gradients(model), run["g"], 1e-7)
    assert_close(torch.stack(watched.losses), run["loss_steps"], 1e-7, "losses")
    assert_close(result.adv_loss, run["total_loss"], 1e-7, "adv_loss")
    plain = run["w"]["decoder.sentence_encoder.embed_tokens.weight"][run["ids"]]
    assert len(seen) == 4
    for embedded, delta in zip(seen, run["delta"], strict=True):
        assert_close(embedded - plain, delta, 1e-7, "perturbation")
