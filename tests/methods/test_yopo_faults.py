"""YOPO where it cannot be right or is interrupted: what is told, and that no pass, partial or full, leaves a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadv
from tests.bert import text, tiny_bert
from tests.models import CLASSES, D, Stateful, TwoCalls, V
from tests.support import (
    assert_gradients,
    assert_unchanged,
    batch,
    clear,
    gradients,
    refused,
    same_bits,
    seeded,
    snapshot,
)

NUMBERS: dict[str, Any] = {"steps": 3, "inner_steps": 3, "step_size": 0.2, "epsilon": 0.5, "random_start": False}


@pytest.mark.parametrize("split", ["bert.encoder", "bert"])
def test_a_split_whose_output_is_no_tensor(split: str) -> None:
    model, data = tiny_bert(), text()
    adv = fastadv.YOPO(model, split=split)
    phrases = [f"the split ({split}) returned BaseModelOutput", "choose a module inside it"]
    refused(model, lambda: adv.backward(lambda: model(**data)), TypeError, *phrases)


class Experts(nn.Module):
    """Two blocks of four experts, of which the forward asks two; each block, or all but the head, in a checkpoint."""

    def __init__(self, checkpoints: str = "none", reentrant: bool = False) -> None:
        super().__init__()
        self.checkpoints, self.reentrant = checkpoints, reentrant
        self.embed, self.tap, self.head = nn.Embedding(V, D), nn.Identity(), nn.Linear(D, CLASSES)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def body(self, ids: Tensor) -> Tensor:
        h = self.tap(self.embed(ids))
        for block in self.blocks:
            h = checkpoint(block, h, use_reentrant=self.reentrant) if self.checkpoints == "blocks" else block(h)
        return h

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = checkpoint(self.body, ids, use_reentrant=False) if self.checkpoints == "body" else self.body(ids)
        return nn.functional.cross_entropy(self.head(h.mean(1)), labels)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(self.experts[0](h) + self.experts[3](h))


def test_the_default_split_is_a_block_and_no_part_of_one() -> None:
    """An expert is not what all of the loss depends on through."""
    model, data = seeded(Experts), batch()
    adv, ran = fastadv.YOPO(model, **NUMBERS), {}
    for name in ("blocks.0.experts.0", "blocks.0.experts.3", "blocks.1"):
        ran[name] = []
        model.get_submodule(name).register_forward_pre_hook(lambda *_, calls=ran[name]: calls.append(1))
    adv.backward(lambda: model(data["input_ids"], data["labels"]))
    assert [len(calls) for calls in ran.values()] == [7, 7, 3]


@pytest.mark.parametrize("scope", ["sample", "table"])
@pytest.mark.parametrize("checkpoints", ["blocks", "body"])
def test_a_split_inside_of_a_checkpoint(checkpoints: str, scope: str) -> None:
    """Partial passes leave the checkpoint in its middle, and their backward recomputes what it needs of it."""
    plain, model, data = seeded(Experts), seeded(lambda: Experts(checkpoints)), batch()
    for net in (plain, model):
        adv = fastadv.YOPO(net, scope=scope, **NUMBERS)
        adv.backward(lambda net=net: net(data["input_ids"], data["labels"]), mask=data["attention_mask"])
    assert_gradients(gradients(model), gradients(plain), 1e-12)


def test_a_split_inside_of_a_reentrant_checkpoint() -> None:
    """It runs under no_grad there, and the message says what to do."""
    model, data = seeded(lambda: Experts("blocks", reentrant=True)), batch()
    adv = fastadv.YOPO(model, **NUMBERS)
    phrases = ["the split (blocks.0)", "use_reentrant=False"]
    refused(model, lambda: adv.backward(lambda: model(data["input_ids"], data["labels"])), RuntimeError, *phrases)


@pytest.mark.parametrize(
    ("index", "compiled"), [*((index, False) for index in range(7)), (1, True), (5, True)], ids=str
)
def test_a_fault_in_the_backward_of_any_pass(index: int, compiled: bool) -> None:
    """Partial passes have a backward too, for which a compiled model's parameters are frozen."""
    torch._dynamo.reset()
    model, data, passes = seeded(Experts, dtype=torch.float32), batch(), []
    run: Any = torch.compile(model, backend="aot_eager") if compiled else model
    adv = fastadv.YOPO(run, **NUMBERS)

    def closure() -> Any:
        passes.append(1)
        return run(data["input_ids"], data["labels"])

    def fail(gradient: Tensor) -> None:
        if len(passes) == index + 1:
            raise KeyboardInterrupt

    adv.backward(closure, mask=data["attention_mask"])
    want = gradients(model)
    clear(model)
    passes.clear()
    handle = model.tap.register_forward_hook(lambda *call: call[-1].register_hook(fail) and None)
    torch._dynamo.reset()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        adv.backward(closure, mask=data["attention_mask"])
    assert len(passes) == index + 1
    assert_unchanged(model, before)
    handle.remove()
    torch._dynamo.reset()
    adv.backward(closure, mask=data["attention_mask"])
    assert_gradients(gradients(model), want, 1e-5)


FAULTS = [(index, place) for index in range(7) for place in ("before", "inside", "swallowed")]


@pytest.mark.parametrize(("index", "place"), FAULTS)
def test_a_fault_in_the_forward_of_any_pass(index: int, place: str) -> None:
    """Of the seven, four are partial. What a closure swallows is its own errors, not the end of a partial pass."""
    model, data, passes = seeded(Stateful, dtype=torch.float32), batch(), []
    adv = fastadv.YOPO(model, embedding=model.embed, split="frozen", dropout="fresh", **NUMBERS)

    def closure() -> Any:
        passes.append(1)
        now = len(passes) == index + 1
        if now and place == "before":
            raise ZeroDivisionError
        handle = model.dropout.register_forward_pre_hook(lambda *_: 1 / 0) if now and place == "inside" else None
        try:
            return model(data["input_ids"], data["labels"])
        except Exception:
            if place == "swallowed":
                pytest.fail("the end of a partial pass looked like an error")
            raise
        finally:
            if handle is not None:
                handle.remove()

    if place == "swallowed":
        adv.backward(closure)
        assert len(passes) == 7
        return
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        adv.backward(closure)
    assert len(passes) == index + 1
    assert_unchanged(model, before)
    twin = copy.deepcopy(model)
    again = fastadv.YOPO(twin, embedding=twin.embed, split="frozen", dropout="fresh", **NUMBERS)
    found = []
    for method, net in ((adv, model), (again, twin)):
        torch.manual_seed(5)
        method.backward(lambda net=net: net(data["input_ids"], data["labels"]))
        found.append(gradients(net))
    assert all(same_bits(found[0][name], found[1][name]) for name in found[0])


class Sidelined(nn.Module):
    """Modules that no split can be: never called, beside the loss, after it, before the lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tap = nn.Embedding(V, D), nn.Identity()
        self.places = nn.Embedding(12, D)
        self.idle, self.aside, self.beside, self.hidden = (nn.Linear(D, D) for _ in range(4))
        self.after, self.head = nn.Linear(1, 1), nn.Linear(D, CLASSES)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        h = self.tap(self.embed(ids)) + places + self.aside(places)
        self.beside(h)
        with torch.no_grad():
            self.hidden(h)
        loss = nn.functional.cross_entropy(self.head(h.mean(1)), labels)
        self.after(loss.view(1))
        return loss


@pytest.mark.parametrize("scope", ["sample", "table"])
@pytest.mark.parametrize(
    ("split", "phrases"),
    [
        ("idle", ["the split (idle) never ran", "split=NAME"]),
        ("beside", ["does not depend on the output of the split (beside)"]),
        ("hidden", ["does not depend on the output of the split (hidden)", "no_grad"]),
        ("after", ["does not depend on the output of the split (after)", "after the loss"]),
        ("aside", ["the output of the split (aside) does not depend on the perturbed embedding", "runs after it"]),
        ("places", ["the split (places) runs before the embedding's call 1", "after its last call"]),
    ],
)
def test_a_split_where_none_can_be(split: str, phrases: list[str], scope: str) -> None:
    model, data = seeded(Sidelined), batch()
    model(data["input_ids"], data["labels"]).backward()
    adv = fastadv.YOPO(model, embedding=model.embed, split=split, scope=scope, **NUMBERS)
    refused(model, lambda: adv.backward(lambda: model(data["input_ids"], data["labels"])), RuntimeError, *phrases)
    assert adv.attacked == 0


@pytest.mark.parametrize(
    ("split", "error", "phrases"),
    [
        ("embed", ValueError, ["the split (embed) is the perturbed embedding itself", "later module"]),
        ("nowhere", ValueError, ["no module is called 'nowhere'", "named_modules"]),
        (None, ValueError, ["Sidelined has no stack of layers", "split=NAME"]),
        (3, TypeError, ["split=", "names and modules", "3"]),
    ],
)
def test_a_split_that_is_refused_at_once(split: Any, error: type[Exception], phrases: list[str]) -> None:
    """And nothing of the method stays in the model."""
    model = seeded(Sidelined)
    refused(model, lambda: fastadv.YOPO(model, embedding=model.embed, split=split), error, *phrases)


def test_an_embedding_that_is_called_again_behind_the_split() -> None:
    """An encoder and a decoder: a split in the encoder never reaches the decoder's lookup; one in the decoder does."""
    model, data = seeded(TwoCalls), batch()
    closure = lambda: model(data["input_ids"], data["input_ids"][:, :3], data["labels"]).loss  # noqa: E731
    adv = fastadv.YOPO(model, split="encode", **NUMBERS)
    refused(model, lambda: adv.backward(closure), RuntimeError, "(encode)", "call 2", "after its last call")
    adv.close()
    adv = fastadv.YOPO(model, split="decode", **NUMBERS)
    result = adv.backward(closure)
    assert result.adv_loss > result.loss


def test_t5_is_told_what_to_split() -> None:
    """An encoder and a decoder of transformers, both perturbed: the default split is in the encoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=4,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = seeded(lambda: T5ForConditionalGeneration(config), dtype=torch.float32).train()
    ids = torch.randint(1, 60, (2, 6), generator=torch.Generator().manual_seed(0))
    closure = lambda: model(input_ids=ids, labels=ids[:, :4].contiguous()).loss  # noqa: E731
    both = ["encoder.embed_tokens", "decoder.embed_tokens"]
    adv = fastadv.YOPO(model, embedding=both, **NUMBERS)
    refused(model, lambda: adv.backward(closure), RuntimeError, "encoder.block.0", "call 2", "after its last call")
    adv.close()
    adv = fastadv.YOPO(model, embedding=both, split="decoder.block.0", **NUMBERS)
    result = adv.backward(closure)
    assert result.adv_loss > result.loss
