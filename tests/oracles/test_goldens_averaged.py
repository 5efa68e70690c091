"""The recorded runs of FreeLB, FreeAT and YOPO are met: see tests/goldens/README.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv import reference
from tests.models import TinyModel, TinyRoberta
from tests.oracles.recorded import ENGINES, Watched, load
from tests.support import GOLDENS, assert_close, assert_gradients, gradients, record

FREELB = sorted(path.stem for path in GOLDENS.glob("freelb_*.npz"))
YOPO = {"yopo_freelbrepo_m2_n1_max0.15": (1, 0.15), "yopo_freelbrepo_m2_n3_max-1": (3, None)}
STEP = {"l2": 0.1, "linf": 0.02}


def hyperparameters(name: str) -> dict[str, Any]:
    """`freelb_hf_mlp_K3_linf_max0.03_init0` -> steps, norm, epsilon, step_size; fairseq makes one pass more than K."""
    parts = name.split("_")
    found: dict[str, Any] = {"epsilon": None, "norm": "linf" if "linf" in parts else "l2"}
    found["step_size"] = STEP[found["norm"]]
    for part in parts:
        if part.startswith("K"):
            found["steps"] = int(part[1:]) + ("fairseq" in parts)
        elif part == "gas2":
            found["epsilon"] = 0.15  # its name does not say so
        elif part.startswith("max") and float(part[3:]) > 0:
            found["epsilon"] = float(part[3:])
    return found


def recorded(name: str) -> tuple[nn.Module, dict[str, Any], Watched]:
    """The model as it was, the run, and a closure; one of two micro-batches counts half."""
    model, run = load(name, TinyModel if "_hf_" in name else TinyRoberta)
    share = 0.5 if name.endswith("gas2") else 1.0
    return model, run, Watched(lambda: share * model(run["ids"], run["mask"], run["labels"]).loss)


def check(model: nn.Module, run: dict[str, Any], watched: Watched, seen: list[Tensor], name: str) -> None:
    """Gradients, losses and perturbations. The public code takes the norms of its l2 projection in float32."""
    loose = 1e-8 if "l2_max0.15" in name or "gas2" in name else 0.0
    assert_gradients(gradients(model), run["g"], 1e-7, absolute=loose)
    losses = torch.stack(watched.losses) * (2 if name.endswith("gas2") else 1)
    assert_close(losses, run["loss_steps"], 1e-7, "losses")
    plain = model.word_embeddings.weight.detach()[run["ids"]]
    assert len(seen) == len(run["delta"])
    for embedded, delta in zip(seen, run["delta"], strict=True):
        assert_close(embedded - plain, delta, 1e-7, "perturbation")


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", FREELB)
def test_freelb(name: str, fused: bool) -> None:
    model, run, watched = recorded(name)
    adv = fastadv.FreeLB(
        model,
        embedding=model.word_embeddings,
        random_start=lambda shape, mask: run["delta"][0],
        fused=fused,
        **hyperparameters(name),
    )
    with record(model) as seen:
        result = adv.backward(watched, mask=run["mask"])
    check(model, run, watched, seen, name)
    assert_close(result.loss, torch.stack(watched.losses).mean(), 1e-12, "loss")


@pytest.mark.parametrize("name", FREELB)
def test_the_reference_meets_freelb(name: str) -> None:
    model, run, watched = recorded(name)
    with record(model) as seen:
        reference.freelb(watched, model.word_embeddings, run["delta"][0], **hyperparameters(name))
    check(model, run, watched, seen, name)


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", YOPO)
def test_yopo(name: str, fused: bool) -> None:
    """The public code makes one full pass more than its `adv_steps` says; partial passes are those seen besides."""
    model, run, watched = recorded(name)
    inner, epsilon = YOPO[name]
    adv = fastadv.YOPO(
        model,
        epsilon=epsilon,
        steps=3,
        inner_steps=inner,
        embedding=model.word_embeddings,
        random_start=lambda shape, mask: run["delta"][0],
        fused=fused,
    )
    assert adv._engine.split.module is model.decoder["sentence_encoder"].layers[0]
    with record(model) as seen:
        adv.backward(watched, mask=run["mask"])
    assert len(seen) == 3 + 2 * (inner - 1)
    check(model, run, watched, seen[::inner], name)


@pytest.mark.parametrize("name", YOPO)
def test_the_reference_meets_yopo(name: str) -> None:
    model, run, watched = recorded(name)
    inner, epsilon = YOPO[name]
    layer = model.decoder["sentence_encoder"].layers[0]
    losses = reference.yopo(
        watched, model.word_embeddings, layer, run["delta"][0], epsilon=epsilon, steps=3, inner_steps=inner
    )
    assert_gradients(gradients(model), run["g"], 1e-7)
    assert_close(torch.stack(losses), run["loss_steps"], 1e-7, "losses")


@pytest.mark.parametrize("masked", [True, False], ids=["mask", "padding_idx"])
@pytest.mark.parametrize("fused", ENGINES)
def test_freeat_drawn_anew(fused: bool, masked: bool) -> None:
    """FreeLB's repository: three replays of one batch, SGD at 0.05, loss / 4, and gradients divided by four samples."""
    model, run = load("freeat_freelbrepo_m3_max0.15", TinyRoberta)
    adv = fastadv.FreeAT(
        model,
        epsilon=0.15,
        step_size=0.1,
        replays=3,
        norm="l2",
        carry=False,
        random_start=lambda shape, mask: run["delta"][0],
        adv_weight=1 / 16,
        embedding=model.word_embeddings,
        fused=fused,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = [run["ids"]]
    losses = []
    for delta, ids in zip(run["delta"], fastadv.repeat(batches, adv.replays), strict=True):
        plain = model.word_embeddings.weight.detach().clone()[ids]
        with record(model) as seen:
            mask = run["mask"] if masked else None
            result = adv.backward(lambda ids=ids: model(ids, labels=run["labels"]).loss, mask=mask)
        assert_close(seen[0] - plain, delta, 1e-7, "perturbation")
        losses.append(result.loss)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(torch.stack(losses), run["loss_steps"], 1e-7, "losses")
    final = adv.state_dict()["slots.0.0"]
    assert_close(final, run["delta_final"], 1e-7, "perturbation")
    for name, parameter in model.named_parameters():
        assert_close(parameter.detach(), run["wf"][name], 1e-7, name)
