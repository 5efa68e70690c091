"""The recorded attacks of public codes that need `at(mask)` are met: see tests/goldens/README.md."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from tests.oracles.recorded import ENGINES
from tests.support import assert_close, golden
from tests.tiny_llama import load

LORA = 2.0  # alpha / r of the recorded adapters
EVERYWHERE = pytest.mark.parametrize("fused", ENGINES)


class Lora(nn.Module):
    """A frozen linear layer and an adapter, as peft has them."""

    def __init__(self, base: nn.Linear, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base.requires_grad_(False), nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + LORA * (x @ self.a.t()) @ self.b.t()


def model_of(run: dict[str, Any]) -> nn.Module:
    """The recorded model, with its adapters where it has some."""
    weights = {f"w::{name}": value for name, value in run["w"].items()}
    model: nn.Module = load({name: value.numpy() for name, value in weights.items()})
    for name, a in run["w"].items():
        if "lora_A" in name:
            place = name.removeprefix("base_model.model.").split(".lora_A")[0]
            parent, _, child = place.rpartition(".")
            adapter = Lora(model.get_submodule(place), a, run["w"][name.replace("lora_A", "lora_B")])
            setattr(model.get_submodule(parent), child, adapter)
    return model


def target_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the tokens with a label."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def at_positions(delta: Tensor, mask: Tensor, room: int) -> Tensor:
    """[B, N, D]: the vectors of [B, T, D] at a mask's positions, in their order."""
    found = torch.zeros(len(mask), room, delta.shape[-1], dtype=delta.dtype)
    for sample, kept in enumerate(mask.bool()):
        found[sample, : int(kept.sum())] = delta[sample, kept]
    return found


class Watching:
    """A closure that keeps what it returned."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.seen = loss, []

    def __call__(self) -> Tensor:
        loss = self.loss()
        self.seen.append(-loss.detach())
        return loss


@EVERYWHERE
@pytest.mark.parametrize("name", ["cat_tl_attack_sign", "cat_tl_attack_sign_published"])
def test_cat(name: str, fused: bool | None) -> None:
    """Sign steps, and a ball per token in units of the mean row norm; the batch has rows without a perturbation.

    That code takes a target's id 0 for a prompt token; here no target has one.
    """
    run = golden(f"llm/{name}")
    steps, step_size = (5, 0.02) if name.endswith("sign") else (10, 1e-4)
    model, labels = model_of(run), run["labels"]
    unit = float(run["epsilon_absolute"]) / 0.05
    away = slice(0, 3)
    mask = run["attention_mask"].bool() & (labels == -100)
    assert torch.equal(mask[away], run["delta_mask"].bool())
    assert not (run["input_ids"][labels != -100] == 0).any()
    mask[3:] = False  # CAT moves the vectors of the harmful rows alone
    adv = fastadv.PGD(
        model,
        epsilon=0.05,
        step_size=step_size / unit,
        steps=steps,
        direction="sign",
        ball="l2",
        scope="token",
        relative=True,
        fused=fused,
    )

    def loss() -> Tensor:
        with adv.at(mask):
            logits = model(run["input_ids"], run["attention_mask"]).logits
        return -target_loss(logits[away], labels[away])

    watched = Watching(loss)
    [value] = adv.find(watched).values
    assert_close(torch.stack(watched.seen), run["loss_attack"], 1e-10, "losses")
    assert_close(value[away], at_positions(run["delta"][-1], mask[away], value.shape[1]), 1e-10, "perturbation")
    assert not value[3:].any()


@EVERYWHERE
@pytest.mark.parametrize("name", ["cat_tl_attack_sign"])
def test_cat_moves_it_to_the_safe_completions(name: str, fused: bool | None) -> None:
    """The vectors found on prompt + harmful lie on the same prompts' tokens before the safe answers."""
    run = golden(f"llm/{name}")
    model, labels = model_of(run), run["labels"]
    ids, attention = run["input_ids"], run["attention_mask"]
    prompt = attention.bool() & (labels == -100)
    harmful, safe = slice(0, 3), slice(3, 6)
    unit = float(run["epsilon_absolute"]) / 0.05
    radii = {"epsilon": 0.05 * unit, "step_size": 0.02, "steps": 5, "direction": "sign", "ball": "l2"}
    adv = fastadv.PGD(model, scope="token", fused=fused, **radii)

    def attack() -> Tensor:
        with adv.at(prompt[harmful]):
            return -target_loss(model(ids[harmful], attention[harmful]).logits, labels[harmful])

    with adv.find(attack).applied(prompt[safe]), torch.no_grad():
        got = model(ids[safe], attention[safe]).logits
    embeds = model.get_input_embeddings()(ids[safe])
    for row in range(3):
        embeds[row, prompt[3 + row]] += run["delta"][-1][row, prompt[row]]
    with torch.no_grad():
        assert_close(got, model(inputs_embeds=embeds, attention_mask=attention[safe]).logits, 1e-10, "logits")


@EVERYWHERE
def test_schwinn_individual(fused: bool | None) -> None:
    """A suffix per sample between a prompt that is padded left and a target that is padded right."""
    run = golden("llm/schwinn_tl_individual")
    prompt, target = run["input_tokens"], run["target_tokens"]
    control = run["control"].expand(len(prompt), -1)
    ids = torch.cat([prompt, control, target], 1)
    attention = (ids != 0).long()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, prompt.shape[1] : prompt.shape[1] + control.shape[1]] = True
    labels = torch.cat([torch.full_like(ids[:, : -target.shape[1]], -100), target.masked_fill(target == 0, -100)], 1)
    _check_suffix(run, ids, attention, mask, labels, 4, 0.02, fused)


@EVERYWHERE
def test_schwinn_suffix(fused: bool | None) -> None:
    run = golden("llm/schwinn_tl_suffix_sign")
    parts = [run["prompt"], run["control"], run["target"]]
    _check_parts(run, parts, 6, 0.01, fused)


@EVERYWHERE
def test_softopt(fused: bool | None) -> None:
    """The whole text in every step: keys and values of the prefix, cached there, are what it computes."""
    run = golden("llm/schwinn_tl_softopt_prefix_cache")
    _check_parts(run, [run["before"], run["control"], run["after"], run["target"]], 5, 0.02, fused)


def _check_parts(run: dict[str, Any], parts: list[Tensor], steps: int, step_size: float, fused: bool | None) -> None:
    ids = torch.cat(parts)[None]
    mask, labels = torch.zeros_like(ids, dtype=torch.bool), torch.full_like(ids, -100)
    mask[:, len(parts[0]) : len(parts[0]) + len(parts[1])] = True
    labels[0, -len(parts[-1]) :] = parts[-1]
    _check_suffix(run, ids, torch.ones_like(ids), mask, labels, steps, step_size, fused)


def _check_suffix(
    run: dict[str, Any],
    ids: Tensor,
    attention: Tensor,
    mask: Tensor,
    labels: Tensor,
    steps: int,
    step_size: float,
    fused: bool | None,
) -> None:
    model = model_of(run)
    rule: dict[str, Any] = {"step_size": step_size, "steps": steps, "direction": "sign", "ball": None}
    adv = fastadv.PGD(model, epsilon=None, scope="token", fused=fused, **rule)

    def loss() -> Tensor:
        with adv.at(mask):
            return -target_loss(model(ids, attention).logits, labels)

    watched = Watching(loss)
    [value] = adv.find(watched).values
    assert_close(torch.stack(watched.seen), run["loss"], 1e-10, "losses")
    assert_close(value, run["delta"][-1], 1e-10, "perturbation")


def completion(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of every target token."""
    found = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    return found[..., 0][targets[:, 1:]]


LAT = [
    ("lat_tl_pgd_layer2", 0.4, 0.05, ["model.layers.2.mlp"]),
    ("lat_tl_pgd_completions", 0.5, 0.1, ["model.embed_tokens", "model.layers.2.mlp"]),
]


@EVERYWHERE
@pytest.mark.parametrize(("name", "epsilon", "step_size", "sites"), LAT)
def test_targeted_lat(name: str, epsilon: float, step_size: float, sites: list[str], fused: bool | None) -> None:
    """AdamW at one site or two, on one text or two: toward the harmful completion, and away from the safe one.

    Away is -log(1 - p), and nothing where log p is below -5.
    """
    run = golden(f"llm/{name}")
    model = model_of(run)
    both = name.endswith("completions")
    texts = [(run["adv_tokens"], run["adv_labels_mask"]), (run["def_tokens"], run["def_labels_mask"])]
    mask = run["prompt_mask"] | (texts[0][1] | texts[1][1] if both else False)
    recorded = [run["delta"][site.removeprefix("model.")] for site in sites]
    steps = len(recorded[0]) - 1
    rule: dict[str, Any] = {"step_size": step_size, "steps": steps, "direction": "adamw", "ball": "l2"}
    adv = fastadv.PGD(model, epsilon=epsilon, scope="token", embedding=sites, fused=fused, **rule)

    def loss() -> Tensor:
        with adv.at(mask):
            toward = -completion(model, *texts[0]).mean()
        if not both:
            return -toward
        with adv.at(mask):
            p = completion(model, *texts[1])
        away = -(torch.log1p(-p.exp()) * (p >= -5)).mean()
        return -0.5 * toward - 0.5 * away

    found = adv.find(loss)
    assert found.sites == sites
    for site, value, delta in zip(sites, found.values, recorded, strict=True):
        assert_close(value, at_positions(delta[-1], mask, value.shape[1]), 1e-10, site)
