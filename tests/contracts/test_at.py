"""`adv.at(mask)`: one perturbation for several forwards and texts, against plain loops in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from tests.oracles.at_by_hand import ByHand
from tests.support import assert_close, assert_gradients, clear, gradients
from tests.tiny_llama import tiny

FUSED = [pytest.param(None, id="fused"), pytest.param(False, id="eager")]
SITES = ["model.embed_tokens", "model.layers.1.mlp", "model.layers.2"]
At = Callable[[Tensor], Any]


class Text(NamedTuple):
    """Ids, attention mask, where the prompt is, and where the target is."""

    ids: Tensor
    attention: Tensor
    prompt: Tensor
    target: Tensor


PROMPTS = [[7, 8, 9], [11, 12, 13, 14, 15], [], [21]]


def text(left: bool, *, length: int, seed: int) -> Text:
    """Each sample's prompt, three words of an answer, and padding on one side."""
    drawn = torch.randint(1, 64, (len(PROMPTS), 3), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [(prompt, answer) for prompt, answer in zip(PROMPTS, drawn, strict=True)]
    ids, attention, where, target = [], [], [], []
    for prompt, answer in rows:
        begin, pad = [2], [0] * (length - 1 - len(prompt) - len(answer))
        kinds = [0] * len(begin) + [1] * len(prompt) + [2] * len(answer)
        words, none = begin + prompt + answer, [-1] * len(pad)
        ids.append(pad + words if left else words + pad)
        kinds = none + kinds if left else kinds + none
        attention.append([int(kind >= 0) for kind in kinds])
        where.append([kind == 1 for kind in kinds])
        target.append([kind == 2 for kind in kinds])
    return Text(torch.tensor(ids), torch.tensor(attention), torch.tensor(where), torch.tensor(target))


HARMFUL, SAFE, OTHER = text(True, length=11, seed=1), text(False, length=13, seed=2), text(False, length=9, seed=3)


def loss_of(model: nn.Module, one: Text) -> Tensor:
    logits = model(one.ids, one.attention).logits[:, :-1]
    each = F.cross_entropy(logits.transpose(1, 2), one.ids[:, 1:], reduction="none")
    kept = one.target[:, 1:]
    return (each * kept).sum() / kept.sum()


def attack_loss(model: nn.Module, at: At) -> Tensor:
    """Two forwards, of other lengths and padding sides, under one perturbation; and one without."""
    plain = loss_of(model, OTHER)
    with at(HARMFUL.prompt):
        toward = loss_of(model, HARMFUL)
    with at(SAFE.prompt):
        away = loss_of(model, SAFE)
    return away - 0.7 * toward + 0.1 * plain


def training_loss(model: nn.Module, at: At) -> Tensor:
    """Three forwards, the one in the middle without."""
    with at(SAFE.prompt):
        safe = loss_of(model, SAFE)
    utility = loss_of(model, OTHER)
    with at(HARMFUL.prompt):
        harmful = loss_of(model, HARMFUL)
    return safe + 0.5 * utility - 0.3 * harmful


def expected(
    model: nn.Module, scope: str, sites: Sequence[str], steps: int = 3, **rule: Any
) -> tuple[ByHand, dict[str, Tensor], Tensor]:
    """The plain loop's perturbation, its training gradients and loss."""
    hand = ByHand(model, sites, [len(prompt) for prompt in PROMPTS], 32)
    radii = {"step_size": dict.fromkeys(sites, 0.3), "epsilon": dict.fromkeys(sites, 0.5)}
    hand.attack(lambda at: attack_loss(model, at), steps=steps, scope=scope, **radii, **rule)
    clear(model)
    loss = training_loss(model, hand.at)
    loss.backward()
    found = gradients(model)
    clear(model)
    return hand, found, loss.detach()


def method(model: nn.Module, scope: str = "token", **options: Any) -> fastadv.PGD:
    settings = {"epsilon": 0.5, "step_size": 0.3, "steps": 3, "clean_weight": 0, "embedding": SITES, **options}
    return fastadv.PGD(model, scope=scope, **settings)


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("sites", [SITES[:1], SITES], ids=["embedding", "sites"])
@pytest.mark.parametrize("scope", ["token", "sample", "batch"])
def test_a_step_is_the_plain_loop(scope: str, sites: list[str], fused: bool | None) -> None:
    model = tiny()
    hand, want, loss = expected(model, scope, sites)
    adv = method(model, scope, embedding=sites, fused=fused)
    attack, closure = lambda: attack_loss(model, adv.at), lambda: training_loss(model, adv.at)
    for _ in range(2):  # the second step takes from the start that the closure uses `at`, in memory of the first
        clear(model)
        result = adv.backward(closure, attack=attack)
        assert_gradients(gradients(model), want, 1e-10)
        assert_close(result.adv_loss, loss, 1e-10, "loss")
    found = adv.find(attack)
    assert found.sites == sites
    for site, value in zip(found.sites, found.values, strict=True):
        assert_close(value, hand.values(site, 5), 1e-10, site)


def test_a_sign_step_in_an_l2_ball() -> None:
    model = tiny()
    _, want, _ = expected(model, "token", SITES, sign=True)
    adv = method(model, direction="sign", ball="l2")
    adv.backward(lambda: training_loss(model, adv.at), attack=lambda: attack_loss(model, adv.at))
    assert_gradients(gradients(model), want, 1e-10)


def test_the_loss_is_attacked_where_there_is_no_attack() -> None:
    """The clean pass counts, and its gradient is the first that is followed."""
    model = tiny()
    hand = ByHand(model, SITES, [len(prompt) for prompt in PROMPTS], 32)
    radii = {"step_size": dict.fromkeys(SITES, 0.3), "epsilon": dict.fromkeys(SITES, 0.5)}
    training_loss(model, lambda _: contextlib.nullcontext()).backward()
    hand.attack(lambda at: training_loss(model, at), steps=2, scope="sample", **radii)
    training_loss(model, hand.at).backward()
    want = gradients(model)
    clear(model)
    adv = method(model, "sample", steps=2, clean_weight=1.0)
    adv.backward(lambda: training_loss(model, adv.at))
    assert_gradients(gradients(model), want, 1e-10)


@pytest.mark.parametrize("held", ["applied(mask)", "applied() and at(mask)"])
def test_it_is_found_and_held_over_optimizer_steps_and_micro_batches(held: str) -> None:
    """Each micro-batch has its own perturbation; SGD moves the weights under both, twice."""
    model, twin = tiny(), tiny()
    micros = [slice(0, 2), slice(2, 4)]

    def cut(one: Text, part: slice) -> Text:
        return Text(*(field[part] for field in one))

    def toward(net: nn.Module, at: At, part: slice) -> Tensor:
        with at(HARMFUL.prompt[part]):
            return -loss_of(net, cut(HARMFUL, part))

    adv = method(model)
    founds = [adv.find(lambda part=part: toward(model, adv.at, part)) for part in micros]
    hands = []
    for part in micros:
        hand = ByHand(twin, SITES, [len(prompt) for prompt in PROMPTS[part]], 32)
        radii = {"step_size": dict.fromkeys(SITES, 0.3), "epsilon": dict.fromkeys(SITES, 0.5)}
        hand.attack(lambda at, part=part: toward(twin, at, part), steps=3, scope="token", **radii)
        hands.append(hand)
    for _ in range(2):
        for net, optimizer in ((model, torch.optim.SGD(model.parameters(), 0.1)),):
            for part, found in zip(micros, founds, strict=True):
                safe = cut(SAFE, part)
                if held == "applied(mask)":
                    with found.applied(safe.prompt):
                        loss = loss_of(net, safe)
                    (loss + loss_of(net, cut(OTHER, part))).backward()
                    continue
                with found.applied():
                    plain = loss_of(net, cut(OTHER, part))
                    with adv.at(safe.prompt):
                        loss = loss_of(net, safe)
                    (plain + loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        for part, hand in zip(micros, hands, strict=True):
            safe = cut(SAFE, part)
            with hand.at(safe.prompt):
                loss = loss_of(twin, safe)
            (loss + loss_of(twin, cut(OTHER, part))).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_close(mine, theirs, 1e-10, name)
