"""Checkpointed segments: behind the embedding, around it, around each of its calls; and reentrant ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from tests.every import HOLDING
from tests.models import TinyModel, TwoCalls
from tests.oracles import oracles
from tests.support import PGD3, assert_gradients, batch, clear, gradients, ready, refused, seeded, two_calls


@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_a_checkpoint_around_the_embedding(scope: str, clean_weight: float) -> None:
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    adv = fastadv.PGD(model, embedding="word_embeddings", scope=scope, clean_weight=clean_weight, **PGD3)
    adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])
    want = gradients(model)
    clear(model)

    def closure() -> Tensor:
        pooled = checkpoint(model.bert, data["input_ids"], data["attention_mask"], use_reentrant=False)
        return F.cross_entropy(model.classifier(pooled), data["labels"])

    adv.backward(closure, mask=data["attention_mask"])
    assert_gradients(gradients(model), want, 1e-12)


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
        adv = fastadv.PGD(net, scope=scope, **PGD3)
        adv.backward(lambda net=net: net(source, target, labels)[0])
        outcomes.append(gradients(net))
    assert_gradients(outcomes[1], outcomes[0], 1e-12)


class Checkpointed(TinyModel):
    """The MLP, or all of the model, runs under a checkpoint."""

    reentrant, whole = True, False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        if self.whole:
            pooled = checkpoint(self.bert, input_ids, attention_mask, use_reentrant=self.reentrant)
        else:
            e = self.bert.embeddings(input_ids)
            pooled = checkpoint(lambda h: torch.tanh(self.bert.ff1(h)), e, use_reentrant=self.reentrant).mean(1)[:, :16]
        loss = nn.functional.cross_entropy(self.classifier(pooled), labels)
        return {"loss": loss}


@pytest.mark.parametrize("whole", [False, True], ids=["after-the-embedding", "around-the-embedding"])
@pytest.mark.parametrize("clean_weight", [1.0, 0.0])
def test_reentrant_checkpointing(clean_weight: float, whole: bool) -> None:
    model, data = seeded(Checkpointed), batch()
    model.whole = whole
    adv = fastadv.PGD(model, embedding=model.word_embeddings, clean_weight=clean_weight)
    with pytest.warns() if whole else pytest.MonkeyPatch.context():
        refused(model, lambda: adv.backward(lambda: model(**data)), RuntimeError, "use_reentrant=False")


@pytest.mark.parametrize("name", HOLDING)
@pytest.mark.parametrize("inside", [False, True])
def test_checkpointing(name: str, inside: bool) -> None:
    """Segments behind the embedding are recomputed as ever; one around it could not tell which perturbation it saw."""
    model, data, _ = ready()
    plain = HOLDING[name](model, embedding=model.word_embeddings)
    torch.manual_seed(1)
    plain.backward(lambda: model(**data))
    want = gradients(model)
    plain.close()
    clear(model)

    class Segment(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, *args: Any) -> Any:
            return checkpoint(self.part, *args, use_reentrant=False)

    if inside:
        model.bert.embeddings = Segment(model.bert.embeddings)
        adv = HOLDING[name](model, embedding=model.bert.embeddings.part.word_embeddings)
        if name == "vat":  # its clean pass is over when the perturbation begins to move
            adv.backward(lambda: model(**data))
        else:
            with pytest.raises(RuntimeError, match="keep it outside of checkpointed segments"):
                adv.backward(lambda: model(**data))
    else:
        model.bert.ff1 = Segment(model.bert.ff1)
        adv = HOLDING[name](model, embedding=model.word_embeddings)
        torch.manual_seed(1)
        adv.backward(lambda: model(**data))
        found = gradients(model)
        assert_gradients({key.replace("ff1.part", "ff1"): grad for key, grad in found.items()}, want, 1e-12)
