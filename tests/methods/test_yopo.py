"""YOPO: its partial passes, where they end, what they cost, under what they run; of one inner step, FreeLB."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from tests.bert import text, tiny_bert
from tests.every import EVERY
from tests.models import CLASSES, D, TinyModel, V
from tests.oracles import oracles
from tests.support import (
    assert_gradients,
    batch,
    clear,
    gradients,
    one_step,
    ready,
    record,
    refused,
    same_bits,
    seeded,
    with_gradients,
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
    end, pooled, closures = counted(model.bert.encoder.layer[0].output), counted(model.bert.pooler), []
    adv = fastadv.YOPO(model, **NUMBERS)

    def closure() -> Any:
        closures.append("begun")
        output = model(**data)
        closures.append("done")
        return output

    adv.backward(closure, mask=data["attention_mask"])
    assert (len(first), len(end), len(second), len(pooled)) == (7, 7, 3, 3)
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


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="transformers compiles with torch 2.7 and up")
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
    first, second = model.get_base_model().bert.encoder.layer
    end, behind = counted(first.output), counted(second)
    result = adv.backward(lambda: model(**data), mask=data["attention_mask"])
    assert (len(end), len(behind)) == (7, 3)
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


@pytest.mark.parametrize("dropout", ["same", "fresh", "off"])
@pytest.mark.parametrize("epsilon", [None, 0.2])
@pytest.mark.parametrize("scope", oracles.SCOPES)
def test_yopo_with_one_inner_step_is_freelb(scope: str, epsilon: float | None, dropout: str) -> None:
    """Bit for bit, random start and dropout included."""
    model, data, _ = ready(dropout=0.2)
    options = {"scope": scope, "epsilon": epsilon, "dropout": dropout, "steps": 3, "step_size": 0.1}
    lb, want, saw = one_step(model, fastadv.FreeLB, data, **options)
    yo, found, seen = one_step(model, fastadv.YOPO, data, split="bert.embeddings", inner_steps=1, **options)
    assert len(seen) == len(saw) == 3
    assert all(same_bits(mine, its) for mine, its in zip(seen, saw, strict=True))
    assert all(same_bits(found[name], want[name]) for name in want)
    assert same_bits(yo.loss, lb.loss) and same_bits(yo.adv_loss, lb.adv_loss)


def test_yopo_keeps_nothing_of_the_split() -> None:
    """Neither what the seven passes brought to it nor the gradient of its output outlives the step."""
    model, data, _ = ready()
    adv, refs = EVERY["yopo"](model, embedding="word_embeddings"), []
    watched = model.bert.ff1.register_forward_pre_hook(lambda _, args: refs.append(weakref.ref(args[0])))
    adv.backward(lambda: model(**data), mask=data["attention_mask"])
    watched.remove()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 7
    assert adv._engine.entrance.forward is None


@pytest.mark.parametrize(
    ("options", "error", "phrases"),
    [
        ({"steps": 0, "split": "ff1"}, ValueError, ["steps", "at least 1"]),
        ({"inner_steps": 0, "split": "ff1"}, ValueError, ["inner_steps", "at least 1"]),
        ({"inner_steps": 1.5, "split": "ff1"}, TypeError, ["inner_steps", "whole number"]),
        ({"tied": "both", "scope": "table", "random_start": False, "split": "ff1"}, ValueError, ["tied"]),
    ],
    ids=str,
)
def test_arguments(options: dict[str, Any], error: type[Exception], phrases: list[str]) -> None:
    model = with_gradients()
    refused(model, lambda: fastadv.YOPO(model, embedding=model.word_embeddings, **options), error, *phrases)
