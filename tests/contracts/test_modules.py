"""What may be perturbed: embeddings under adapters, several, scaled ones, and any module with a [B, T, D] output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from tests.bert import text, tiny_bert
from tests.models import D, TinyModel, V
from tests.oracles import oracles
from tests.support import PGD3, assert_close, assert_gradients, batch, gradients, record, seeded


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks transformers
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
    adv = fastadv.PGD(model, scope=scope, **PGD3)
    adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])

    def loss_at(embeds: Tensor) -> Tensor:
        inputs = {"attention_mask": data["attention_mask"], "labels": data["labels"]}
        return model(inputs_embeds=embeds, **inputs).loss

    ids = data["input_ids"]
    want = oracles.attack(model, loss_at, weight, ids, scope=scope, mask=data["attention_mask"], **PGD3)
    assert_gradients(gradients(model), want.gradients, 1e-9)
    assert weight.grad is None
    assert sum(p.grad is not None for p in model.parameters()) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("scope", ["batch", "sample", "token"])
@pytest.mark.parametrize("name", ["bert.embeddings", "bert.ff1"])
def test_any_module_in_position_scopes(name: str, scope: str) -> None:
    """Latent adversarial training: a module's output [B, T, D] is perturbed where the model reads it."""
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    mask = data["attention_mask"]
    adv = fastadv.PGD(model, embedding=name, scope=scope, **PGD3)
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
    for _ in range(PGD3["steps"]):
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
    adv = fastadv.PGD(model, embedding=["word_embeddings", places], scope=scope, **PGD3)
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
    for _ in range(PGD3["steps"]):
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
    adv = fastadv.PGD(model, embedding=embed, scope=scope, **PGD3)
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
        **PGD3,
    )
    name = "bert.embeddings.word_embeddings.weight"
    got = gradients(model)
    del got[name], want.gradients[name]
    assert_gradients(got, want.gradients, 1e-9)
    assert_close(seen[-1] - outputs, want.perturbations[-1], 1e-9, "perturbation")
