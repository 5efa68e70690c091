"""Models of many structures: tied and shared tables, checkpoints, padding, batches of many shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastadv
from tests.models import D, TinyModel, TwoCalls, V
from tests.oracles import oracles
from tests.support import PGD3, assert_close, assert_gradients, batch, clear, gradients, record, seeded, two_calls


def two_call_oracle(
    model: TwoCalls, data: tuple[Tensor, Tensor, Tensor], scope: str, masks: list[Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """PGD with one r for both calls (table scopes), or one r per call, each with its own ball."""
    ids, weight = data[:2], model.shared.weight
    keep = [mask.to(weight).unsqueeze(-1) for mask in masks]
    shared = scope in oracles.TABLE_SCOPES
    r = [torch.zeros(V, D).double()] if shared else [torch.zeros(*i.shape, D).double() for i in ids]

    def spread(r: list[Tensor]) -> list[Tensor]:
        return [k * (r[0][i] if shared else r[n]) for n, (k, i) in enumerate(zip(keep, ids, strict=True))]

    def loss(r: list[Tensor], table: Tensor) -> Tensor:
        return model(*data, [table[i] + s for i, s in zip(ids, spread(r), strict=True)]).loss

    for _ in range(PGD3["steps"]):
        r = [x.detach().requires_grad_() for x in r]
        grads = torch.autograd.grad(loss(r, weight.detach()), r)
        r = [
            oracles.ascend(x, g, scope=scope, norm="l2", step_size=PGD3["step_size"], epsilon=PGD3["epsilon"])
            for x, g in zip(r, grads, strict=True)
        ]
    r = [x.detach() for x in r]
    zero = [torch.zeros_like(x) for x in r]
    return spread(r), oracles.gradients_of(model, loss(r, weight) + loss(zero, weight))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masks"])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_one_embedding_called_twice(scope: str, masked: bool) -> None:
    """Table scopes: one perturbation for the union of both calls' ids. Position scopes: one per call, in call order."""
    model, data = two_calls()
    masks = [torch.ones_like(ids) for ids in data[:2]]
    if masked:
        masks[0][1, 2:], masks[1][3, 4] = 0, 0
    adv = fastadv.PGD(model, scope=scope, **PGD3)
    with record(model) as seen:
        adv.backward(lambda: model(*data).loss, mask=masks if masked else None)
    perturbations, want = two_call_oracle(model, data, scope, masks)
    assert_gradients(gradients(model), want, 1e-9)
    for embedded, ids, r in zip(seen[-2:], data[:2], perturbations, strict=True):
        assert_close(embedded - model.shared.weight[ids], r, 1e-9, "perturbation")


@pytest.mark.parametrize("kind", ["mlp", "tfm"])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_padding_idx_is_the_mask_where_none_is_given(scope: str, kind: str) -> None:
    """The model reads its padding, so without a mask it would be perturbed. As in torch, its row has no gradient."""
    model, data = seeded(lambda: TinyModel(kind, padding_idx=1)), batch(pad=1)
    ids, weight = data["input_ids"], model.word_embeddings.weight
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope, **PGD3)
    with record(model) as seen:
        adv.backward(lambda: model(ids, labels=data["labels"]).loss)
    want = oracles.attack(
        model,
        lambda e: model(labels=data["labels"], inputs_embeds=e).loss,
        weight,
        ids,
        scope=scope,
        mask=ids != 1,
        **PGD3,
    )
    want.gradients["bert.embeddings.word_embeddings.weight"][1] = 0
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert torch.equal(seen[-1][ids == 1], weight[ids[ids == 1]])


def test_a_given_mask_overrules_padding_idx() -> None:
    model, data = seeded(lambda: TinyModel("tfm", padding_idx=1)), batch(pad=1)
    ids = data["input_ids"]
    adv = fastadv.FGM(model, embedding=model.word_embeddings, scope="token", epsilon=0.5)
    with record(model) as seen:
        adv.backward(lambda: model(ids, labels=data["labels"]).loss, mask=torch.ones_like(ids))
    moved = (seen[1] - seen[0]).norm(dim=-1)
    assert_close(moved[ids == 1], torch.full_like(moved[ids == 1], 0.5), 1e-9, "length at padding")


def test_another_batch_has_another_shape_and_other_ids() -> None:
    """Nothing of one step's perturbation, mask or ids is left in the next."""
    model = seeded(lambda: TinyModel("tfm"))
    for scope in oracles.SCOPES:
        adv = fastadv.PGD(model, embedding="word_embeddings", scope=scope, **PGD3)
        for rows, length, masked in [(4, 7, True), (2, 5, False), (4, 7, False), (4, 7, True), (1, 7, False)]:
            data = batch(rows, length, seed=rows + length)
            ids, mask = data["input_ids"], data["attention_mask"] if masked else None
            clear(model)
            adv.backward(lambda ids=ids, data=data: model(ids, labels=data["labels"]).loss, mask=mask)
            want = oracles.attack(
                model,
                lambda e, data=data: model(labels=data["labels"], inputs_embeds=e).loss,
                model.word_embeddings.weight,
                ids,
                scope=scope,
                mask=mask,
                **PGD3,
            )
            assert_gradients(gradients(model), want.gradients, 1e-9)
        adv.close()
