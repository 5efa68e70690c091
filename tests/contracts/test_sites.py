"""`embedding=` of several places: outputs and inputs, by pattern, each with a radius of its own."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.engine.model.find import names, sites
from tests.contracts.test_at import FUSED, HARMFUL, OTHER, PROMPTS, SAFE, attack_loss, loss_of, training_loss
from tests.every import EVERY
from tests.oracles.at_by_hand import ByHand
from tests.support import assert_close, assert_gradients, clear, gradients
from tests.tiny_llama import tiny

CHOICE = ["model.embed_tokens", "model.layers.{0,2}.mlp", ("model.layers.3", "input")]
NAMES = ["model.embed_tokens", "model.layers.0.mlp", "model.layers.2.mlp", "model.layers.3:input"]
BY_HAND = ["model.embed_tokens", "model.layers.0.mlp", "model.layers.2.mlp", "input:model.layers.3"]
EPSILON, STEP = [0.4, 0.2, 0.3, 0.6], [0.3, 0.1, 0.2, 0.5]


def method(model: nn.Module, scope: str = "token", **options: Any) -> fastadv.PGD:
    settings = {"epsilon": EPSILON, "step_size": STEP, "steps": 3, "clean_weight": 0, "embedding": CHOICE, **options}
    return fastadv.PGD(model, scope=scope, **settings)


def by_hand(model: nn.Module, scope: str) -> tuple[ByHand, dict[str, Tensor]]:
    hand = ByHand(model, BY_HAND, [len(prompt) for prompt in PROMPTS], 32)
    radii = {"step_size": dict(zip(BY_HAND, STEP, strict=True)), "epsilon": dict(zip(BY_HAND, EPSILON, strict=True))}
    hand.attack(lambda at: attack_loss(model, at), steps=3, scope=scope, **radii)
    clear(model)
    training_loss(model, hand.at).backward()
    found = gradients(model)
    clear(model)
    return hand, found


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("scope", ["token", "sample"])
def test_every_place_has_its_own_radius(scope: str, fused: bool | None) -> None:
    model = tiny()
    hand, want = by_hand(model, scope)
    adv = method(model, scope, fused=fused)
    adv.backward(lambda: training_loss(model, adv.at), attack=lambda: attack_loss(model, adv.at))
    assert_gradients(gradients(model), want, 1e-10)
    assert list(adv.perturbation_norms) == NAMES
    for name, site in zip(NAMES, BY_HAND, strict=True):
        value = hand.values(site, 5)
        norms = value.norm(dim=-1) if scope == "token" else value.flatten(1).norm(dim=1)
        assert_close(adv.perturbation_norms[name], norms[norms > 0].mean(), 1e-10, name)


def test_without_at_every_call_has_its_own() -> None:
    """One forward, its mask given to backward: the same as `at` over the same positions."""
    model, other = tiny(), tiny()
    adv, twin = method(model), method(other)
    adv.backward(lambda: -loss_of(model, HARMFUL), mask=HARMFUL.prompt)

    def closure() -> Tensor:
        with twin.at(HARMFUL.prompt):
            return -loss_of(other, HARMFUL)

    twin.backward(closure)
    assert_gradients(gradients(model), gradients(other), 1e-12)
    assert adv.perturbation_norms.keys() == twin.perturbation_norms.keys()
    for name, norm in adv.perturbation_norms.items():
        assert_close(norm, twin.perturbation_norms[name], 1e-12, name)


@pytest.mark.parametrize(
    "epsilon",
    [
        {"model.layers.{0,2}.mlp": 0.2, "embed_tokens": 0.4, ("model.layers.3", "input"): 0.6},
        {"model.layers.0.mlp": 0.2, "model.layers.2.mlp": 0.2, "embed_tokens": 0.4, ("layers.3", "input"): 0.6},
    ],
)
def test_radii_by_name(epsilon: Any) -> None:
    adv = method(tiny(), epsilon=epsilon, step_size=0.1)
    assert [adv.rule.of(site).epsilon for site in range(4)] == [0.4, 0.2, 0.2, 0.6]
    assert [adv.rule.of(site).step_size for site in range(4)] == [0.1] * 4


def test_a_place_may_have_no_ball() -> None:
    adv = method(tiny(), epsilon=[None, 0.2, 0.3, 0.6], random_start=False)
    assert [adv.rule.of(site).epsilon for site in range(4)] == [None, 0.2, 0.3, 0.6]
    assert adv.step_size == STEP


def test_a_random_start_has_the_size_of_its_ball() -> None:
    """U(-1, 1) * epsilon / sqrt(length * D): the largest element says which epsilon it was."""
    model = tiny()
    adv = method(model, "sample", random_start=True, epsilon=[4.0, 0.0, 0.3, 40.0], step_size=0.0)
    seen: list[float] = []

    def closure() -> Tensor:
        with adv.at(HARMFUL.prompt):
            return loss_of(model, HARMFUL)

    found = adv.find(closure)
    for value in found.values:
        lengths = torch.tensor([max(len(prompt), 1) for prompt in PROMPTS])
        seen.append(float((value.abs().amax((1, 2)) * (lengths * 32).sqrt()).max()))
    assert 3.5 < seen[0] <= 4.0
    assert seen[1] == 0
    assert 0.25 < seen[2] <= 0.3
    assert 35 < seen[3] <= 40


def test_names_and_patterns() -> None:
    model = tiny()
    assert names(model, sites(model, CHOICE)) == NAMES
    assert names(model, sites(model, [*CHOICE, "layers.0.mlp"])) == NAMES  # named twice, it is perturbed once
    assert names(model, sites(model, ("layers.1", "input"))) == ["model.layers.1:input"]
    both = sites(model, [("layers.{1,2}", "input"), "layers.1"])
    assert names(model, both) == ["model.layers.1:input", "model.layers.2:input", "model.layers.1"]
    assert names(model, sites(model, "layers.{1, 3}.{mlp,self_attn}")) == [
        f"model.layers.{layer}.{part}" for layer in (1, 3) for part in ("mlp", "self_attn")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding": "model.layers.{0,9}.mlp"}, r"no module is called 'model.layers.9.mlp'"),
        ({"embedding": ("embed_tokens", "input"), "epsilon": 1.0, "step_size": 1.0}, "what an embedding is given are"),
        ({"epsilon": [0.1, 0.2]}, "epsilon has 2 values for 4 perturbed modules"),
        ({"step_size": [0.1] * 5}, "step_size has 5 values for 4 perturbed modules"),
        ({"epsilon": {"embed_tokens": 0.1}}, "epsilon says nothing of model.layers.0.mlp"),
        ({"epsilon": {"layers.1": 0.1}}, "epsilon names 'layers.1', which embedding= does not perturb"),
        ({"epsilon": [0.1, 0.2, 0.3, -1.0]}, "epsilon must be finite and at least 0"),
        ({"scope": "table", "embedding": "embed_tokens", "epsilon": [0.1], "step_size": 1.0}, "one for all tables"),
        ({"scope": "table", "epsilon": 1.0, "step_size": 1.0}, "needs an nn.Embedding"),
        ({"relative": True}, "relative=True takes its unit from an embedding's rows"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(tiny(), **options)


def test_a_step_size_is_a_number() -> None:
    with pytest.raises(TypeError, match="step_size must be a number, not None"):
        method(tiny(), step_size=[0.1, 0.1, 0.1, None])


@pytest.mark.parametrize("name", ["smart", "vat", "llr"])
def test_methods_that_reckon_with_epsilon_take_one(name: str) -> None:
    with pytest.raises(TypeError, match="epsilon must be a number"):
        EVERY[name](tiny(), embedding=CHOICE, epsilon=EPSILON)


def test_the_input_may_come_by_name() -> None:
    """As transformers' decoders give hidden states to attention."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner = nn.Embedding(9, 4), Inner()

        def forward(self, ids: Tensor) -> Tensor:
            return self.inner(scale=torch.ones(()), hidden_states=self.table(ids))

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, scale: Tensor, hidden_states: Tensor) -> Tensor:
            return self.linear(hidden_states) * scale

    torch.manual_seed(0)
    model, ids = Named().double(), torch.tensor([[1, 2, 3]])
    adv = fastadv.FGM(model, epsilon=0.5, scope="token", embedding=("inner", "input"), clean_weight=0)
    adv.backward(lambda: model(ids).sum())
    weight = model.inner.linear.weight.detach()
    moved = model.table(ids).detach() + 0.5 * weight / weight.norm()
    assert_close(model.inner.linear.weight.grad, moved.sum((0, 1))[None], 1e-12, "gradient")
    with pytest.raises(RuntimeError, match="given no floating tensor"):
        fastadv.FGM(model, scope="token", embedding=(model, "input")).backward(lambda: model(ids).sum())


class Sandwich(nn.Module):
    """A layer of Gemma 2's form: a norm after the mlp."""

    def __init__(self, after: str | None) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Linear(4, 4), nn.Linear(4, 4)
        self.post_attention_layernorm = nn.LayerNorm(4)
        if after is not None:
            setattr(self, after, nn.LayerNorm(4))


@pytest.mark.parametrize(
    ("after", "part", "warns"),
    [
        ("post_feedforward_layernorm", "mlp", True),
        ("post_feedforward_layernorm", "self_attn", True),
        ("post_mlp_layernorm", "mlp", True),
        ("post_feedforward_layernorm", ("mlp", "input"), False),
        (None, "mlp", False),
        (None, "self_attn", False),  # Llama's post_attention_layernorm is behind the sum
    ],
)
def test_a_norm_behind_the_place_is_told(after: str | None, part: Any, warns: bool) -> None:
    model = nn.ModuleDict({"layer": Sandwich(after)})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastadv.PGD(model, scope="token", embedding=part)
    assert [warning.filename == __file__ for warning in caught] == [True] * warns
    assert all("does not keep its length" in str(warning.message) for warning in caught)


def test_places_outside_of_the_block_are_plain() -> None:
    model = tiny()
    adv = method(model)

    def attack() -> Tensor:
        with adv.at(SAFE.prompt):
            return loss_of(model, SAFE)

    found = adv.find(attack)
    want = loss_of(model, OTHER)
    with found.applied():
        assert torch.equal(loss_of(model, OTHER), want)
        with adv.at(HARMFUL.prompt):
            assert not torch.equal(loss_of(model, HARMFUL), want)
