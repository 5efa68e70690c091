"""YOPO's partial passes: where they end, what they cost, under what they run, and what is told where they cannot."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.bert import text, tiny_bert
from tests.models import CLASSES, D, TinyModel, TwoCalls, V
from tests.support import (
    assert_gradients,
    batch,
    clear,
    gradients,
    record,
    refused,
    same_bits,
    seeded,
)

NUMBERS: dict[str, Any] = {"steps": 3, "inner_steps": 3, "step_size": 0.2, "epsilon": 0.5, "random_start": False}


def counted(module: nn.Module) -> list[str]:
    """One entry for every time that `module` begins to run."""
    calls: list[str] = []
    module.register_forward_pre_hook(lambda *_: calls.append("ran"))
    return calls


def step_of(model: nn.Module, run: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
    clear(model)
    adv, data = fastadv.YOPO(run, **{**NUMBERS, **options}), text()
    adv.backward(lambda: run(**data), mask=data["attention_mask"])
    adv.close()
    return gradients(model)


def test_partial_passes_end_at_the_first_block() -> None:
    """The default split of a BERT is its first layer: 3 full passes, 4 partial; those run no later one."""
    model, data = tiny_bert(), text()
    first, second = (counted(layer) for layer in model.bert.encoder.layer)
    pooled, closures = counted(model.bert.pooler), []
    adv = fastadv.YOPO(model, **NUMBERS)
    assert adv.engine.split.module is model.bert.encoder.layer[0]
    assert adv.engine.split.name == "bert.encoder.layer.0"

    def closure() -> Any:
        closures.append("begun")
        output = model(**data)
        closures.append("done")
        return output

    adv.backward(closure, mask=data["attention_mask"])
    assert (len(first), len(second), len(pooled)) == (7, 3, 3)
    assert (closures.count("begun"), closures.count("done")) == (7, 3)


@pytest.mark.parametrize("choice", ["name", "suffix", "module"])
def test_a_split_may_be_named(choice: str) -> None:
    model = tiny_bert()
    layer = model.bert.encoder.layer[1]
    split = {"name": "bert.encoder.layer.1", "suffix": "layer.1", "module": layer}[choice]
    later = step_of(model, model, split=split)
    assert_gradients(step_of(model, model, split=layer), later, 1e-12)
    with pytest.raises(AssertionError, match="relative error"):
        assert_gradients(step_of(model, model), later, 1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("scope", ["sample", "table"])
def test_under_checkpointing_autocast_and_a_scaler(scope: str, norm: str) -> None:
    options = {"scope": scope, "norm": norm}
    model = tiny_bert()
    want = step_of(model, model, **options)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_gradients(step_of(model, model, **options), want, 1e-9)
    model.gradient_checkpointing_disable()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaled = step_of(model, model, scaler=scaler, **options)
    assert_gradients({name: grad / 2**8 for name, grad in scaled.items()}, want, 1e-9)


@pytest.mark.parametrize("inner", [False, True], ids=["model", "inner"])
def test_compiled(inner: bool) -> None:
    """The graph breaks at the split; the second step compiles nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, data = tiny_bert(dtype=torch.float32), text()
    want = step_of(model, model)
    compiled: Any = torch.compile(model, backend="aot_eager")
    if inner:
        model.bert.compile(backend="aot_eager")
        compiled = model
    adv, graphs = fastadv.YOPO(compiled, **NUMBERS), []
    for _ in range(2):
        clear(model)
        adv.backward(lambda: compiled(**data), mask=data["attention_mask"])
        assert_gradients(gradients(model), want, 1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[0] > 0
    adv.close()
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    torch._dynamo.reset()
    model = tiny_bert(dtype=torch.float32)
    want = step_of(model, model)
    assert_gradients(step_of(model, torch.compile(model)), want, 1e-5)
    torch._dynamo.reset()


def test_peft() -> None:
    """LoRA's weights alone are trained; the split is found inside of the wrapper."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_bert(), peft.LoraConfig(target_modules=["query", "value"], r=2))
    adv, data = fastadv.YOPO(model, **NUMBERS), text()
    assert adv.engine.split.name.endswith("bert.encoder.layer.0")
    result = adv.backward(lambda: model(**data), mask=data["attention_mask"])
    assert result.adv_loss > result.loss
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient and all("lora" in name for name in with_gradient)


class Shared(nn.Module):
    """One layer, three times: as ALBERT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tap = nn.Embedding(V, D), nn.Identity()
        self.layer, self.head = nn.Linear(D, D), nn.Linear(D, CLASSES)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        h = self.tap(self.embed(ids))
        for _ in range(3):
            h = torch.tanh(self.layer(h))
        return nn.functional.cross_entropy(self.head(h.mean(1)), labels)


def test_the_first_call_of_a_shared_layer_counts() -> None:
    model, data = seeded(Shared), batch()
    calls = counted(model.layer)
    adv = fastadv.YOPO(model, split="layer", **NUMBERS)
    with record(model) as seen:
        adv.backward(lambda: model(data["input_ids"], data["labels"]))
    assert len(calls) == 3 * 3 + 4
    weight, ids = model.embed.weight.detach(), data["input_ids"]
    delta = (seen[0] - weight[ids]).requires_grad_()
    hidden = model.layer(weight[ids] + delta)
    h = hidden
    for call in range(3):
        h = torch.tanh(h if call == 0 else model.layer(h))
    (p,) = torch.autograd.grad(
        nn.functional.cross_entropy(model.head(h.mean(1)), data["labels"]), hidden, retain_graph=True
    )
    moved = delta.detach()
    for _ in range(3):
        moved = moved.requires_grad_()
        (g,) = torch.autograd.grad((p * model.layer(weight[ids] + moved)).sum(), moved)
        moved = moved.detach() + 0.2 * g / g.flatten(1).norm(dim=1).view(-1, 1, 1)
        moved = moved * (0.5 / moved.flatten(1).norm(dim=1).view(-1, 1, 1)).clamp(max=1)
    torch.testing.assert_close(seen[3].detach() - weight[ids], moved, rtol=1e-9, atol=1e-12)


def test_copies_and_pickles_carry_no_split() -> None:
    model, data = seeded(lambda: TinyModel("tfm")), batch()
    plain = model(**data).loss
    adv = fastadv.YOPO(model, embedding=model.word_embeddings, split="ff1", **NUMBERS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert same_bits(twin(**data).loss.detach(), plain.detach())
        fastadv.FGM(twin, embedding=twin.word_embeddings).backward(lambda twin=twin: twin(**data).loss)
    before = len(model.bert.ff1._forward_hooks)
    adv.close()
    assert len(model.bert.ff1._forward_hooks) == before - 1


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
