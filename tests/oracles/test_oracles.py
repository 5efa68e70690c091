"""Every scope, norm, mask, weight and start against the formulas in float64, on models with attention."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.models import TinyModel, TinyRoberta
from tests.oracles import oracles
from tests.support import assert_close, assert_gradients, batch, gradients, record, seeded

FGM = {"steps": 1, "step_size": 0.7, "epsilon": 0.7}
PGD = {"steps": 3, "step_size": 0.3, "epsilon": 0.5}
CASES = list(itertools.product(oracles.SCOPES, oracles.NORMS, ["fgm", "pgd"], [1.0, 0.0]))
LINF = 0.05  # an element of a perturbation of length 0.5 is about this large


def build(kind: str) -> nn.Module:
    model: nn.Module = seeded(TinyRoberta if kind == "roberta" else lambda: TinyModel("tfm"), seed=3)
    return model


def sizes(method: str, norm: str) -> dict[str, Any]:
    numbers = dict(FGM if method == "fgm" else PGD)
    if norm == "linf":
        numbers.update(step_size=numbers["step_size"] * LINF, epsilon=numbers["epsilon"] * LINF)
    return numbers


def make(model: nn.Module, method: str, numbers: dict[str, Any], **options: Any) -> Any:
    if method == "fgm":
        return fastadv.FGM(model, epsilon=numbers["epsilon"], embedding=model.word_embeddings, **options)
    return fastadv.PGD(model, embedding=model.word_embeddings, **numbers, **options)


def loss_at(model: nn.Module, data: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the looked-up embeddings. No attention mask: padding is read, so the mask matters."""
    return lambda embeds: model(data["input_ids"], labels=data["labels"], inputs_embeds=embeds).loss


def holes(data: dict[str, Tensor]) -> Tensor:
    """The padding mask with a hole inside a sentence, at an id that also stands elsewhere."""
    mask = data["attention_mask"].clone()
    mask[1, 1] = 0
    data["input_ids"][0, 2] = data["input_ids"][1, 1]
    return mask


def in_table(start: Tensor, ids: Tensor, keep: Tensor, rows: int) -> Tensor:
    """A start seen at positions, as a table."""
    table = start.new_zeros(rows, start.shape[-1])
    table[ids[keep]] = start[keep]
    return table


@pytest.mark.parametrize("started", [False, True], ids=["zero", "start"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
@pytest.mark.parametrize("kind", ["tfm", "roberta"])
@pytest.mark.parametrize(("scope", "norm", "method", "clean_weight"), CASES)
def test_step(scope: str, norm: str, method: str, clean_weight: float, kind: str, masked: bool, started: bool) -> None:
    """Gradients, perturbations and losses of every pass, to 1e-9."""
    model, data = build(kind), batch(pad=1)
    ids, numbers = data["input_ids"], sizes(method, norm)
    mask = holes(data) if masked else None
    keep = mask if mask is not None else ids != 1 if kind == "roberta" else torch.ones_like(ids)
    keep = keep.bool()
    noise = torch.Generator().manual_seed(5)

    def start(shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
        return 0.05 * (2 * torch.rand(shape, generator=noise, dtype=torch.float64) - 1)

    adv = make(
        model,
        method,
        numbers,
        scope=scope,
        norm=norm,
        clean_weight=clean_weight,
        random_start=start if started else False,
    )
    losses: list[Tensor] = []

    def closure() -> Tensor:
        losses.append(model(ids, labels=data["labels"]).loss)
        return losses[-1]

    with record(model) as seen:
        result = adv.backward(closure, mask=mask)
    weight = model.word_embeddings.weight
    first = (seen[1 if clean_weight else 0] - weight[ids]).detach() if started else None
    if first is not None:
        assert first[keep].abs().max() > 0
        assert not first[~keep].any()
        if scope in oracles.TABLE_SCOPES:
            first = in_table(first, ids, keep, len(weight))
    want = oracles.attack(
        model,
        loss_at(model, data),
        weight,
        ids,
        scope=scope,
        norm=norm,
        mask=keep,
        clean_weight=clean_weight,
        start=first,
        **numbers,
    )
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert len(seen) == len(want.perturbations)
    for embedded, perturbation in zip(seen, want.perturbations, strict=True):
        assert_close(embedded - weight[ids], perturbation, 1e-9, "perturbation")
    assert_close(torch.stack(losses), torch.stack(want.losses), 1e-9, "losses")
    assert_close(result.adv_loss, want.losses[-1], 1e-9, "adv_loss")
    if clean_weight:
        assert_close(result.loss, want.losses[0], 1e-9, "loss")
    assert adv.attacked == 1
    assert int(adv.skipped) == 0


@pytest.mark.parametrize(("clean_weight", "adv_weight"), [(1.0, 0.5), (0.25, 2.0), (0.0, 3.0)])
@pytest.mark.parametrize("method", ["fgm", "pgd"])
def test_weights_scale_the_two_gradients_and_not_the_attack(
    method: str, clean_weight: float, adv_weight: float
) -> None:
    model, data = build("tfm"), batch()
    numbers = sizes(method, "l2")
    adv = make(model, method, numbers, scope="sample", clean_weight=clean_weight, adv_weight=adv_weight)
    with record(model) as seen:
        adv.backward(lambda: model(data["input_ids"], labels=data["labels"]).loss)
    weight, ids = model.word_embeddings.weight, data["input_ids"]
    want = oracles.attack(
        model,
        loss_at(model, data),
        weight,
        ids,
        scope="sample",
        clean_weight=clean_weight,
        adv_weight=adv_weight,
        **numbers,
    )
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert_close(seen[-1] - weight[ids], want.perturbations[-1], 1e-9, "perturbation")


@pytest.mark.parametrize("norm", oracles.NORMS)
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_no_ball(scope: str, norm: str) -> None:
    """epsilon=None: the steps add up."""
    model, data = build("tfm"), batch()
    adv = fastadv.PGD(
        model, epsilon=None, step_size=0.2, steps=3, scope=scope, norm=norm, embedding=model.word_embeddings
    )
    with record(model) as seen:
        adv.backward(lambda: model(data["input_ids"], labels=data["labels"]).loss)
    weight, ids = model.word_embeddings.weight, data["input_ids"]
    want = oracles.attack(
        model, loss_at(model, data), weight, ids, scope=scope, norm=norm, epsilon=None, step_size=0.2, steps=3
    )
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert_close(seen[-1] - weight[ids], want.perturbations[-1], 1e-9, "perturbation")


@pytest.mark.parametrize("scope", oracles.SCOPES)
@pytest.mark.parametrize("rows", [(1, 1), (1, 5), (3, 1)], ids=str)
def test_odd_shapes(rows: tuple[int, int], scope: str) -> None:
    """One token, one sample, one position."""
    model, data = build("tfm"), batch(*rows)
    adv = make(model, "pgd", PGD, scope=scope)
    ids = data["input_ids"]
    adv.backward(lambda: model(ids, labels=data["labels"]).loss)
    want = oracles.attack(model, loss_at(model, data), model.word_embeddings.weight, ids, scope=scope, **PGD)
    assert_gradients(gradients(model), want.gradients, 1e-9)


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_a_sample_without_a_token_stays_as_it_is(scope: str) -> None:
    model, data = build("tfm"), batch()
    mask = data["attention_mask"].clone()
    mask[2] = 0
    ids = data["input_ids"]
    adv = make(model, "pgd", PGD, scope=scope)
    with record(model) as seen:
        adv.backward(lambda: model(ids, labels=data["labels"]).loss, mask=mask)
    want = oracles.attack(model, loss_at(model, data), model.word_embeddings.weight, ids, scope=scope, mask=mask, **PGD)
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert torch.equal(seen[-1][2], model.word_embeddings.weight[ids[2]])
    assert int(adv.skipped) == 0
