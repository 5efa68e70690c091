"""The recorded runs of public implementations are met: see tests/goldens/README.md."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv import native, reference
from tests.models import TinyModel, TinyRoberta
from tests.support import assert_close, assert_gradients, golden, gradients, record, seeded

FGM_ZHIHU = ["fgm_zhihu_mlp_eps0.5", "fgm_zhihu_mlp_eps1.0"]
PGD_ZHIHU = [
    "pgd_zhihu_mlp_eps0.5_a0.3_K3",
    "pgd_zhihu_mlp_eps1.0_a0.3_K1",
    "pgd_zhihu_mlp_eps1.0_a0.3_K3",
    "pgd_zhihu_mlp_eps1.0_a0.3_K5",
]
NATIVE = pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}")
ENGINES = [pytest.param(True, id="fused", marks=NATIVE), pytest.param(False, id="eager")]


def hyperparameters(name: str) -> dict[str, Any]:
    """`..._eps0.5_a0.3_K3` -> {"epsilon": 0.5, "step_size": 0.3, "steps": 3}."""
    known = {"eps": ("epsilon", float), "a": ("step_size", float), "K": ("steps", int)}
    found = {}
    for part in name.split("_mlp_")[1].split("_"):
        key = part.rstrip("0123456789.")
        word, kind = known[key]
        found[word] = kind(part.removeprefix(key))
    return found


def load(
    name: str, build: Callable[[], nn.Module], dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, dict[str, Any]]:
    run = golden(name)
    model = seeded(build, dtype=dtype)
    model.load_state_dict(run["w"])
    return model, run


class Watched:
    """A closure that keeps every loss it returned."""

    def __init__(self, forward: Callable[[], Tensor]) -> None:
        self.forward = forward
        self.losses: list[Tensor] = []

    def __call__(self) -> Tensor:
        loss = self.forward()
        self.losses.append(loss.detach())
        return loss


def zhihu(name: str) -> tuple[nn.Module, dict[str, Any], Watched]:
    model, run = load(name, TinyModel)
    return model, run, Watched(lambda: model(run["ids"], run["mask"], run["labels"]).loss)


def check_zhihu(model: nn.Module, run: dict[str, Any], watched: Watched, seen: list[Tensor]) -> None:
    """Gradients, the loss of every pass and the perturbation of every pass."""
    assert_gradients(gradients(model), run["g"], 1e-7)
    want = torch.cat([run["loss_clean"].reshape(1), run["loss_adv"].reshape(-1)])
    assert_close(torch.stack(watched.losses), want, 1e-7, "losses")
    table, real = run["w"]["bert.embeddings.word_embeddings.weight"], run["mask"].bool()
    assert torch.equal(seen[0], table[run["ids"]])
    steps = run["r"].reshape(-1, *table.shape)
    assert len(seen) == len(steps) + 1
    for embedded, r in zip(seen[1:], steps, strict=True):
        assert_close((embedded - table[run["ids"]])[real], r[run["ids"]][real], 1e-7, "perturbation")


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
