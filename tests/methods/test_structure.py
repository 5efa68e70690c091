"""Models of many structures: tied and shared tables, adapters, checkpoints, padding, several and other modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from fastadv import reference
from tests import oracles
from tests.bert import text, tiny_bert
from tests.models import D, TiedLM, TinyModel, TwoCalls, V
from tests.support import assert_close, assert_gradients, batch, clear, gradients, record, relative, seeded

PGD: dict[str, Any] = {"epsilon": 0.5, "step_size": 0.3, "steps": 3}


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_tied_weights_perturb_the_lookups_and_not_the_head(scope: str) -> None:
    model, ids = seeded(TiedLM), batch()["input_ids"]
    weight = model.embed.weight
    adv = fastadv.PGD(model, scope=scope, **PGD)
    with record(model) as seen:
        adv.backward(lambda: model(ids).loss)
    want = oracles.attack(model, lambda e: model(ids, e).loss, weight, ids, scope=scope, **PGD)
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert_close(seen[-1] - weight[ids], want.perturbations[-1], 1e-9, "perturbation")


def test_tied_weights_differ_from_the_classic_script() -> None:
    """The script moves the table, and the head with it; most of that perturbation comes from the head's gradient."""
    model, ids = seeded(TiedLM), batch()["input_ids"]
    adv = fastadv.FGM(model, epsilon=0.5)
    adv.backward(lambda: model(ids).loss)
    mine = gradients(model)
    clear(model)
    adv.close()
    reference.fgm(model, lambda: model(ids).loss, model.embed, epsilon=0.5)
    assert relative(gradients(model)["mix.weight"], mine["mix.weight"]) > 1e-3


def two_calls() -> tuple[TwoCalls, tuple[Tensor, Tensor, Tensor]]:
    model, data = seeded(TwoCalls), batch()
    target = batch(4, 5, seed=6)["input_ids"]
    return model, (data["input_ids"], target, data["labels"])


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

    for _ in range(PGD["steps"]):
        r = [x.detach().requires_grad_() for x in r]
        grads = torch.autograd.grad(loss(r, weight.detach()), r)
        r = [
            oracles.ascend(x, g, scope=scope, norm="l2", step_size=PGD["step_size"], epsilon=PGD["epsilon"])
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
    adv = fastadv.PGD(model, scope=scope, **PGD)
    with record(model) as seen:
        adv.backward(lambda: model(*data).loss, mask=masks if masked else None)
    perturbations, want = two_call_oracle(model, data, scope, masks)
    assert_gradients(gradients(model), want, 1e-9)
    for embedded, ids, r in zip(seen[-2:], data[:2], perturbations, strict=True):
        assert_close(embedded - model.shared.weight[ids], r, 1e-9, "perturbation")


class Recomputed(TwoCalls):
    """Each call of the embedding lies in a checkpoint of its own; backward recomputes the last one first."""

    def forward(self, source: Tensor, target: Tensor, labels: Tensor, embeds: Any = None) -> Any:
        def encode(ids: Tensor) -> Tensor:
            return torch.tanh(self.encode(self.tap(self.shared(ids)))).mean(1, keepdim=True)

        def decode(ids: Tensor, context: Tensor) -> Tensor:
            return torch.tanh(self.decode(self.tap(self.shared(ids))) + context)

        context = checkpoint(encode, source, use_reentrant=False)
        logits = self.head(checkpoint(decode, target, context, use_reentrant=False).mean(1))
        return (F.cross_entropy(logits, labels), logits)


@pytest.mark.parametrize("alike", [False, True], ids=["lengths-differ", "lengths-alike"])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_checkpoints_around_two_calls(scope: str, alike: bool) -> None:
    """A recomputed call sees its own perturbation, not its neighbour's."""
    model, (source, target, labels) = two_calls()
    if alike:
        target = source.flip(0).contiguous()
    outcomes = []
    for net in (model, seeded(Recomputed)):
        adv = fastadv.PGD(net, scope=scope, **PGD)
        adv.backward(lambda net=net: net(source, target, labels)[0])
        outcomes.append(gradients(net))
    assert_gradients(outcomes[1], outcomes[0], 1e-12)


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_a_checkpoint_around_the_embedding(scope: str, clean_weight: float) -> None:
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    adv = fastadv.PGD(model, embedding="word_embeddings", scope=scope, clean_weight=clean_weight, **PGD)
    adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    want = gradients(model)
    clear(model)

    def closure() -> Tensor:
        pooled = checkpoint(model.bert, data["input_ids"], data["attention_mask"], use_reentrant=False)
        return F.cross_entropy(model.classifier(pooled), data["labels"])

    adv.backward(closure, mask=data["attention_mask"])
    assert_gradients(gradients(model), want, 1e-12)


@pytest.mark.parametrize("kind", ["mlp", "tfm"])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_padding_idx_is_the_mask_where_none_is_given(scope: str, kind: str) -> None:
    """The model reads its padding here, so without a mask it would be perturbed. As in torch, its row has no gradient."""
    model, data = seeded(lambda: TinyModel(kind, padding_idx=1)), batch(pad=1)
    ids, weight = data["input_ids"], model.word_embeddings.weight
    adv = fastadv.PGD(model, embedding=model.word_embeddings, scope=scope, **PGD)
    with record(model) as seen:
        adv.backward(lambda: model(ids, labels=data["labels"]).loss)
    want = oracles.attack(
        model,
        lambda e: model(labels=data["labels"], inputs_embeds=e).loss,
        weight,
        ids,
        scope=scope,
        mask=ids != 1,
        **PGD,
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
        adv = fastadv.PGD(model, embedding="word_embeddings", scope=scope, **PGD)
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
                **PGD,
            )
            assert_gradients(gradients(model), want.gradients, 1e-9)
        adv.close()


@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_lora(scope: str) -> None:
    """PEFT: the embedding is frozen and still perturbed; the adapters get their gradients and nobody else."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query", "value"], r=2, lora_dropout=0.0, modules_to_save=["classifier"])
    model = peft.get_peft_model(tiny_bert(), config).double()
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then lora_A has no gradient
                p.copy_(0.1 * torch.randn(p.shape, generator=noise))
    data = text()
    weight = model.get_input_embeddings().weight
    assert not weight.requires_grad
    adv = fastadv.PGD(model, scope=scope, **PGD)
    adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])

    def loss_at(embeds: Tensor) -> Tensor:
        inputs = {"attention_mask": data["attention_mask"], "labels": data["labels"]}
        return model(inputs_embeds=embeds, **inputs).loss

    ids = data["input_ids"]
    want = oracles.attack(model, loss_at, weight, ids, scope=scope, mask=data["attention_mask"], **PGD)
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert weight.grad is None
    assert sum(p.grad is not None for p in model.parameters()) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("scope", ["batch", "sample", "token"])
@pytest.mark.parametrize("name", ["bert.embeddings", "bert.ff1"])
def test_any_module_in_position_scopes(name: str, scope: str) -> None:
    """Latent adversarial training: a module's output [B, T, D] is perturbed where the model reads it."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    mask = data["attention_mask"]
    adv = fastadv.PGD(model, embedding=name, scope=scope, **PGD)
    adv.backward(lambda: model(**data).loss, mask=mask)
    got = gradients(model)
    adv.close()
    module = model.get_submodule(name)
    width = D if name == "bert.embeddings" else 24
    keep = mask.double().unsqueeze(-1)

    def loss_at(r: Tensor) -> Tensor:
        handle = module.register_forward_hook(lambda module, inputs, output: output + keep * r)
        try:
            return model(**data).loss
        finally:
            handle.remove()

    r = torch.zeros(*mask.shape, width, dtype=torch.float64)
    for _ in range(PGD["steps"]):
        r.requires_grad_()
        (g,) = torch.autograd.grad(loss_at(r), r)
        r = oracles.ascend(r, g, scope=scope, norm="l2", step_size=0.3, epsilon=0.5).detach()
    assert_gradients(got, oracles.gradients_of(model, loss_at(r) + model(**data).loss), 1e-9)


class Tuple(nn.Module):
    """A layer whose output is a tuple that begins with the hidden states, as decoder layers' often is."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)

    def forward(self, h: Tensor) -> tuple[Tensor, str]:
        return torch.tanh(self.inner(h)), "cache"


class WithTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer, self.head = nn.Embedding(V, D), Tuple(), nn.Linear(D, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, cache = self.layer(self.embed(ids))
        assert cache == "cache"
        return self.head(hidden)


def test_a_tuple_output() -> None:
    model, data = seeded(WithTuple), batch()
    adv = fastadv.FGM(model, embedding=model.layer, scope="token", epsilon=0.5)
    result = adv.backward(lambda: F.cross_entropy(model(data["input_ids"]).mean(1), data["labels"]))
    assert float(result.adv_loss) > float(result.loss)
    assert_close(adv.perturbation_norm, torch.tensor(0.5).double(), 1e-9, "norm")


@pytest.mark.parametrize("scope", oracles.TABLE_SCOPES)
def test_two_embeddings(scope: str) -> None:
    """Words and positions perturbed together, as one table: equal ids of the two are different rows."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    words, places = model.bert.embeddings.word_embeddings, model.bert.embeddings.position_embeddings
    adv = fastadv.PGD(model, embedding=["word_embeddings", places], scope=scope, **PGD)
    adv.backward(lambda: model(**data).loss)
    got, ids = gradients(model), data["input_ids"]
    tables = torch.cat([words.weight, places.weight]).detach()

    def loss_at(r: Tensor) -> Tensor:
        e = words.weight[ids] + r[ids] + (places.weight + r[V:])[: ids.shape[1]]
        h = model.bert.embeddings.LayerNorm(e)
        old = model.bert.embeddings
        model.bert.embeddings = Constant(h)
        try:
            return model(**data).loss
        finally:
            model.bert.embeddings = old

    r = torch.zeros_like(tables)
    for _ in range(PGD["steps"]):
        r.requires_grad_()
        (g,) = torch.autograd.grad(loss_at(r), r)
        r = oracles.ascend(r, g, scope=scope, norm="l2", step_size=0.3, epsilon=0.5).detach()
    total = loss_at(r) + loss_at(torch.zeros_like(r))
    assert_gradients(got, oracles.gradients_of(model, total), 1e-9)


class Constant(nn.Module):
    """Stands in for the embeddings and returns what it was given."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any) -> Tensor:
        return self.hidden


def kinds() -> dict[str, Callable[[], nn.Embedding]]:
    """Embeddings that are not a plain lookup."""

    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * D**0.5

    return {
        "scaled": lambda: Scaled(V, D),
        "max-norm": lambda: nn.Embedding(V, D, max_norm=2.0),
        "by-frequency": lambda: nn.Embedding(V, D, scale_grad_by_freq=True),
    }


@pytest.mark.parametrize("kind", list(kinds()))
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_embeddings_that_are_no_plain_lookup(scope: str, kind: str) -> None:
    """The perturbation is added to what they return; after the scale, where there is one."""
    model, data = seeded(TinyModel), batch()
    model.bert.embeddings.word_embeddings = seeded(kinds()[kind])
    ids, embed = data["input_ids"], model.word_embeddings
    embed(ids)  # max_norm renormalises the rows in place on the first call
    adv = fastadv.PGD(model, embedding=embed, scope=scope, **PGD)
    with record(model) as seen:
        adv.backward(lambda: model(**data).loss)
    adv.close()
    outputs = embed(ids).detach()
    table = torch.zeros(V, D).double()
    table[ids.flatten()] = outputs.flatten(0, 1)
    want = oracles.attack(
        model,
        lambda e: model(None, data["attention_mask"], data["labels"], e).loss,
        table.requires_grad_(),
        ids,
        scope=scope,
        **PGD,
    )
    name = "bert.embeddings.word_embeddings.weight"
    got = gradients(model)
    del got[name], want.gradients[name]
    assert_gradients(got, want.gradients, 1e-9)
    assert_close(seen[-1] - outputs, want.perturbations[-1], 1e-9, "perturbation")
