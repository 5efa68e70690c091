"""Dropout over the passes of a step, on a real BERT: a fresh mask each, one mask for all, or none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.bert import text, tiny_bert
from tests.support import assert_gradients, gradients, same_bits


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny_bert(dropout=0.2)


@pytest.fixture
def data() -> dict[str, Tensor]:
    return text()


def losses_of(model: nn.Module, data: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """The loss of every pass of a step whose perturbation starts away from zero and never moves."""
    torch.manual_seed(3)
    losses = []

    def closure() -> Tensor:
        losses.append(model(**data).loss)
        return losses[-1]

    def start(shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
        return torch.full(shape, 0.1)

    adv = fastadv.PGD(model, step_size=0.0, epsilon=None, clean_weight=0, scope="sample", random_start=start, **options)
    try:
        adv.backward(closure, mask=data["attention_mask"])
    finally:
        adv.close()
        model.zero_grad()
    assert len(losses) == 4
    return losses


def test_same_gives_one_loss_for_one_perturbation(model: nn.Module, data: dict[str, Tensor]) -> None:
    first, *others = losses_of(model, data, dropout="same")
    assert all(same_bits(first, other) for other in others)


def test_fresh_gives_another_loss_each_pass(model: nn.Module, data: dict[str, Tensor]) -> None:
    losses = losses_of(model, data, dropout="fresh")
    assert len({float(loss.detach()) for loss in losses}) == 4


def test_off_gives_the_loss_without_dropout(model: nn.Module, data: dict[str, Tensor]) -> None:
    training = {name: module.training for name, module in model.named_modules()}
    losses = losses_of(model, data, dropout="off")
    assert {name: module.training for name, module in model.named_modules()} == training
    bare = tiny_bert(dropout=0.0)
    for loss, want in zip(losses, losses_of(bare, data), strict=True):
        assert same_bits(loss, want)


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("method", [fastadv.FGM, fastadv.PGD])
def test_same_leaves_the_generator_where_one_pass_does(
    method: Any, clean_weight: float, model: nn.Module, data: dict[str, Tensor]
) -> None:
    torch.manual_seed(3)
    plain = model(**data).loss
    after_one = torch.get_rng_state()
    adv = method(model, dropout="same", clean_weight=clean_weight)
    torch.manual_seed(3)
    result = adv.backward(lambda: model(**data))
    adv.close()
    model.zero_grad()
    assert torch.equal(torch.get_rng_state(), after_one)
    assert same_bits(result.output.loss, plain.detach())


def test_same_replays_the_first_mask_in_the_gradient(model: nn.Module, data: dict[str, Tensor]) -> None:
    """At epsilon 0 clean and adversarial pass are one: twice the gradient of plain training from the same seed."""
    torch.manual_seed(3)
    model(**data).loss.backward()
    plain = gradients(model)
    model.zero_grad()
    adv = fastadv.FGM(model, epsilon=0.0, dropout="same")
    torch.manual_seed(3)
    adv.backward(lambda: model(**data))
    adv.close()
    doubled = gradients(model)
    model.zero_grad()
    for name, grad in plain.items():
        torch.testing.assert_close(doubled[name], 2 * grad, rtol=1e-12, atol=1e-15)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", ["same", "fresh"])
@pytest.mark.parametrize("method", [fastadv.FreeLB, fastadv.YOPO])
def test_checkpoints_recompute_the_masks(method: Any, dropout: str, attention: str, data: dict[str, Tensor]) -> None:
    """In partial passes too, whose backward recomputes a layer that the forward left half-way."""
    found = []
    for checkpointing in (False, True):
        net = tiny_bert(dropout=0.2, attention=attention)
        if checkpointing:
            net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        adv = method(net, dropout=dropout, random_start=False)
        torch.manual_seed(3)
        adv.backward(lambda net=net: net(**data), mask=data["attention_mask"])
        found.append((gradients(net), torch.get_rng_state()))
    (want, drawn), (got, redrawn) = found
    assert_gradients(got, want, 1e-12)
    assert torch.equal(drawn, redrawn)


def test_off_keeps_running_statistics_running() -> None:
    """Dropout is off; batch norm still normalises by the batch and updates its averages."""
    net = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(1), nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 1))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 1]])
    before = net[2].running_mean.clone()
    adv = fastadv.FGM(net, dropout="off", scope="sample", epsilon=0.0)
    result = adv.backward(lambda: net(ids).square().mean())
    assert same_bits(result.loss, result.adv_loss)
    assert not torch.equal(net[2].running_mean, before)
    assert net[3].training
