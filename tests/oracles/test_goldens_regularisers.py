"""The recorded runs of SMART, VAT, AWP and NEFTune are met: see tests/goldens/README.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from fastadv import reference
from fastadv.methods.smart import stable_kl
from tests.models import TinyModel
from tests.oracles.recorded import ENGINES, load
from tests.support import assert_close, assert_gradients, golden, gradients, record, relative

WORDS = "bert.embeddings.word_embeddings"
Start = Callable[[Any, Any], Tensor]


@contextlib.contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module returns, call by call, as what comes after it sees it."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda *call: seen.append(call[-1].detach().clone()))
    try:
        yield seen
    finally:
        handle.remove()


def assert_noise(seen: list[Tensor], noise: Tensor, tolerance: float) -> None:
    """The first pass is clean, the others add the recorded noise, padding included."""
    assert len(seen) == len(noise) + 1
    for index, (embedded, want) in enumerate(zip(seen[1:], noise, strict=True)):
        assert_close(embedded - seen[0], want, tolerance, f"noise {index}")


# SMART. The public codes hold the other side of each KL divergence fixed.


def both_sides_fixed(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, -1), F.softmax(target.detach(), -1), reduction="batchmean") + F.kl_div(
        F.log_softmax(target, -1), F.softmax(logits.detach(), -1), reduction="batchmean"
    )


def from_the_mean(logits: Tensor, target: Tensor) -> Tensor:
    """mt-dnn's JS: divergences of the fixed mean from each side."""
    mean = (F.softmax(logits.detach(), -1) + F.softmax(target.detach(), -1)) / 2
    sides = (F.kl_div(F.log_softmax(x, -1), mean, reduction="batchmean") for x in (logits, target))
    return sum(sides, torch.zeros(()))


def stable_both_sides(logits: Tensor, target: Tensor) -> Tensor:
    return (stable_kl(logits, target.detach()) + stable_kl(target, logits.detach())) / len(logits)


def squeezed(logits: Tensor, target: Tensor) -> Tensor:
    """mt-dnn's squared error takes the last dimension from one side alone: [B] against [B, 1] is B x B differences."""
    return (logits.squeeze(-1) - target).square().mean()


def summed(logits: Tensor, target: Tensor) -> Tensor:
    """smart-pytorch's: a sum over the batch, with a weight of 0.02."""
    return 0.02 * len(logits) * both_sides_fixed(logits, target)


SMART: dict[str, dict[str, Any]] = {
    "smart_mtdnn_mlp_symkl_k1": {"divergence": both_sides_fixed},
    "smart_mtdnn_mlp_symkl_k2": {"divergence": both_sides_fixed, "steps": 2},
    "smart_mtdnn_mlp_js_k1": {"divergence": from_the_mean},
    "smart_mtdnn_mlp_nssymkl_k1": {"divergence": stable_both_sides},
    "smart_mtdnn_mlp_mse_k1": {"divergence": squeezed, "search": lambda a, b: (a - b).square().sum()},
    "smartpt_mlp_kl_symkl_s1": {"divergence": summed, "search": "kl"},
    "smartpt_mlp_kl_symkl_s3": {"divergence": summed, "search": "kl", "steps": 3},
    "smartpt_mlp_kl_symkl_l2": {"divergence": summed, "search": "kl", "norm": "l2"},
    "smartpt_mlp_mse_s1": {"divergence": lambda a, b: 0.02 * F.mse_loss(a, b), "search": F.mse_loss},
}


def smart(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any], list[Tensor], fastadv.StepResult]:
    regression = "_mse_" in name
    model, run = load(name, lambda: TinyModel(classes=1 if regression else 3))
    embedding = model.bert.embeddings if "mtdnn" in name else model.word_embeddings
    adv = fastadv.SMART(
        model, embedding=embedding, update="mt-dnn", random_start=lambda shape, mask: run["noise"][0], **options
    )
    targets = run["reg_targets"] if regression else run["labels"]
    with outputs_of(embedding) as seen:
        result = adv.backward(lambda: model(run["ids"], run["mask"], targets))
    return model, run, seen, result


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", SMART)
def test_smart(name: str, fused: bool) -> None:
    """The search's gradient, and mt-dnn's own losses, are computed in float32 there: 2e-4. smart-pytorch: 1e-7."""
    model, run, seen, result = smart(name, fused=fused, **SMART[name])
    tolerance = 2e-4 if "mtdnn" in name else 1e-7
    assert_gradients(gradients(model), run["g"], tolerance)
    assert_noise(seen, run["noise"], tolerance)
    assert_close(result.loss, run["loss_task"], 1e-12, "loss")
    weight = 0.02 if "smartpt" in name else 1.0
    assert_close(result.adv_loss, weight * run["loss_adv"].double(), tolerance, "adv_loss")


def test_the_public_step_of_smart_leaves_the_noise_random() -> None:
    """Its gradient step is some 1e-6 of what is then brought to length one: the direction is that of the noise."""
    _, run, _, _ = smart("smart_mtdnn_mlp_symkl_k1", **SMART["smart_mtdnn_mlp_symkl_k1"])
    assert float(F.cosine_similarity(*run["noise"], dim=-1).min()) > 0.9999
    model, run = load("smart_mtdnn_mlp_symkl_k1", TinyModel)
    adv = fastadv.SMART(model, embedding=model.bert.embeddings, epsilon=1.0, random_start=lambda *_: run["noise"][0])
    with outputs_of(model.bert.embeddings) as seen:
        adv.backward(lambda: model(run["ids"], run["mask"], run["labels"]))
    moved = (seen[-1] - seen[0])[run["mask"].bool()]
    start = run["noise"][0][run["mask"].bool()]
    assert float(F.cosine_similarity(moved, start, dim=-1).abs().mean()) < 0.5  # the paper's step turns it


def test_mtdnns_squared_error_is_not_ours() -> None:
    """Its broadcasting counts B x B differences: on equal answers it is not zero. `divergence="mse"` is."""
    model, run, _, result = smart("smart_mtdnn_mlp_mse_k1", divergence="mse")
    assert relative(result.adv_loss, run["loss_adv"]) > 0.5
    answers = torch.randn(4, 1)
    assert float(squeezed(answers, answers)) > 0.1
    assert relative(gradients(model)["classifier.weight"], run["g"]["classifier.weight"]) > 0.01


# VAT


def vat(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    model, run = load(name, TinyModel, dtype)
    adv = fastadv.VAT(model, embedding=WORDS, random_start=lambda shape, mask: run["noise"][1], **options)
    with record(model) as seen:
        result = adv.backward(lambda: {"logits": model(run["ids"], run["mask"]).logits})
    return model, run, seen, result


@pytest.mark.parametrize("fused", ENGINES)
def test_vat_of_miyato(fused: bool) -> None:
    """float32; its norm has 1e-6 under the root."""
    model, run, seen, result = vat("vat_miyato_tf_ip1", torch.float32, epsilon=5.0, xi=0.1, fused=fused)
    assert_gradients(gradients(model), run["g"], 2e-4)
    assert_noise(seen, run["noise"][1:], 2e-4)
    assert_close(result.adv_loss, run["loss_adv"], 2e-4, "adv_loss")
    assert torch.equal(result.loss, result.adv_loss)  # there is no label


LYAKAAP = {"vat_lyakaap_mlp_ip1_xi10": (10.0, 1), "vat_lyakaap_mlp_ip2_xi0.1": (0.1, 2)}


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", LYAKAAP)
def test_vat_of_lyakaap(name: str, fused: bool) -> None:
    """Directions, and what follows from the perturbation. It detaches the looked-up words: they get no gradient there.

    The defect left behind: it divides by |g| + 1e-8, and at a distance of 0.1 |g| is some 1e-5, so that its
    perturbation is up to two thousandths short of the length that was asked for.
    """
    xi, steps = LYAKAAP[name]
    model, run, seen, _ = vat(name, xi=xi, steps=steps, fused=fused)
    for embedded, noise in zip(seen[1:], run["noise"][1:], strict=True):
        found, want = (x.flatten(1) for x in (embedded - seen[0], noise))
        assert float(F.cosine_similarity(found, want).min()) > 1 - 1e-6
        assert (want.norm(dim=1) <= found.norm(dim=1) * (1 + 1e-9)).all()
    assert_close((seen[-1] - seen[0]).flatten(1).norm(dim=1), torch.ones(4).double(), 1e-12, "length")
    # At the perturbation that it came to, to the last digit.
    model, run = load(name, TinyModel)
    adv = fastadv.SMART(
        model,
        embedding=WORDS,
        epsilon=10.0,
        step_size=0.0,
        norm="l2",
        scope="sample",
        divergence=to_a_constant,
        random_start=lambda *_: run["noise"][-1],
        fused=fused,
    )
    result = adv.backward(lambda: (0 * model.classifier.bias.sum(), model(run["ids"], run["mask"]).logits))
    assert_close(result.adv_loss, run["lds"], 1e-7, "adv_loss")
    found = gradients(model)
    assert not run["g"].pop(WORDS + ".weight").any()
    assert found.pop(WORDS + ".weight").any()
    assert_gradients(found, run["g"], 1e-7)


def to_a_constant(logits: Tensor, target: Tensor) -> Tensor:
    return fastadv.ops.divergence(logits, target.detach(), "kl")


# AWP

AWP: dict[str, dict[str, Any]] = {
    "awp_csdongxian_mlp_g0.005_plr1.0": {"gamma": 0.005},
    "awp_csdongxian_mlp_g0.01_plr0.01": {"gamma": 0.01},
    "awp_torchblocks_mlp_n1_a0.001_e0.01": {"gamma": 0.001, "epsilon": 0.01},
    "awp_torchblocks_mlp_n1_a1.0_e0.01": {"gamma": 1.0, "epsilon": 0.01},
    "awp_torchblocks_mlp_n2_a1.0_e0.01": {"gamma": 1.0, "epsilon": 0.01, "steps": 2},
}


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", AWP)
def test_awp(name: str, fused: bool) -> None:
    """Both codes keep the gradient at the moved weights alone; the weights are back bit for bit."""
    model, run = load(name, TinyModel)
    options = {"parameters": lambda name, _: "weight" in name} if "torchblocks" in name else {}
    adv = fastadv.AWP(model, clean_weight=0, fused=fused, **AWP[name], **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved: list[dict[str, Tensor]] = []

    def closure() -> Tensor:
        moved.append({name: p.detach() - before[name] for name, p in model.named_parameters()})
        return model(run["ids"], run["mask"], run["labels"]).loss

    result = adv.backward(closure)
    assert_gradients(gradients(model), run["g"], 1e-7)
    for parameter, want in run["r"].items():
        assert_close(moved[-1][parameter], want, 1e-7, parameter)
    assert_close(result.adv_loss, run["loss_adv"].reshape(-1)[-1], 1e-7, "adv_loss")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# NEFTune

NEFTUNE: dict[str, dict[str, Any]] = {
    "neftune_hf_mlp_a0.1": {"alpha": 0.1, "padded": True},
    "neftune_hf_mlp_a5": {"alpha": 5.0, "padded": True},
    "neftune_official_mlp_a5": {"alpha": 5.0},
}


@pytest.mark.parametrize("fused", ENGINES)
@pytest.mark.parametrize("name", NEFTUNE)
def test_neftune(name: str, fused: bool) -> None:
    """The recorded noise; and that what is drawn here is bounded as it is there."""
    model, run = load(name, TinyModel)
    options = NEFTUNE[name]
    adv = fastadv.NEFTune(model, embedding=WORDS, random_start=lambda shape, mask: run["noise"], fused=fused, **options)
    plain = model.word_embeddings.weight.detach()[run["ids"]]
    with record(model) as seen:
        result = adv.backward(lambda: model(run["ids"], run["mask"], run["labels"]).loss, mask=run["mask"])
    adv.close()
    assert_gradients(gradients(model), run["g"], 1e-7)
    assert_close(result.loss, run["loss"], 1e-7, "loss")
    assert_close(seen[0] - plain, run["noise"], 1e-7, "noise")
    length = run["mask"].sum(1) if name.startswith("neftune_official") else torch.full((4,), 7)
    bound = options["alpha"] / (length * plain.shape[-1]).sqrt()
    ours = fastadv.NEFTune(model, embedding=WORDS, fused=fused, **options)
    with record(model) as seen:
        ours.backward(lambda: model(run["ids"], run["mask"], run["labels"]).loss, mask=run["mask"])
    for noise in (run["noise"], seen[0] - plain):
        largest = noise.abs().flatten(1).amax(1) / bound
        assert (largest <= 1).all()
        assert (largest > 0.9).all()
        assert bool(noise[run["mask"] == 0].any()) == options.get("padded", False)


def test_the_reference_of_neftune_and_awp() -> None:
    """They meet the runs of their authors' codes; AWP's keeps the clean gradient besides."""
    model, run = load("neftune_official_mlp_a5", TinyModel)
    reference.neftune(lambda: model(run["ids"], run["mask"], run["labels"]).loss, model.word_embeddings, run["noise"])
    assert_gradients(gradients(model), run["g"], 1e-7)
    model, run = load("awp_csdongxian_mlp_g0.01_plr0.01", TinyModel)
    model(run["ids"], run["mask"], run["labels"]).loss.backward()
    clean = gradients(model)
    model.zero_grad()
    reference.awp(model, lambda: model(run["ids"], run["mask"], run["labels"]).loss, gamma=0.01)
    assert_gradients(gradients(model), {name: g + clean[name] for name, g in run["g"].items()}, 1e-7)


def test_the_stand_in_for_kl() -> None:
    """mt-dnn's `stable_kl` is what was recorded of it, and not the KL divergence."""
    run = golden("stable_kl_mtdnn")
    assert_close(stable_kl(run["logit"], run["target"]), run["out_sum"], 2e-4, "sum")
    for found in (stable_kl(run["logit"], run["target"]) / 3, run["out_mean"]):
        assert relative(fastadv.ops.divergence(run["logit"], run["target"], "kl"), found) > 0.5
