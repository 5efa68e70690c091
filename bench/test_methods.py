"""One training step per method: the classic script against the engine, and plain training for scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import fastadv
from fastadv import reference

SIZES = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "FGM": (fastadv.FGM, reference.fgm, {"epsilon": 1.0}),
    "PGD-3": (fastadv.PGD, reference.pgd, {"epsilon": 1.0, "step_size": 0.3, "steps": 3}),
}


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30522,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES[request.config.getoption("--size")],
    )
    return BertForSequenceClassification(config)


@pytest.fixture(scope="module")
def closure(model: nn.Module) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = (torch.rand(16, 64, generator=generator).pow(6) * 30000).long() + 1  # roughly Zipf: many repeats
    labels = torch.randint(0, 2, (16,), generator=generator)
    return lambda: model(input_ids=ids, labels=labels).loss


def gradients(model: nn.Module) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def step(contestant: str, name: str, model: nn.Module, closure: Callable[[], torch.Tensor]) -> Callable[[], object]:
    method, script, numbers = METHODS[name]
    if contestant == "plain":
        return lambda: closure().backward()
    if contestant == "reference":
        return lambda: script(model, closure, model.get_input_embeddings(), **numbers)
    adv = method(model, **numbers)
    return lambda: adv.backward(closure)


@pytest.mark.parametrize("contestant", ["plain", "reference", "fastadv"])
@pytest.mark.parametrize("name", METHODS)
def test_training_step(
    benchmark: Any, model: nn.Module, closure: Callable[[], torch.Tensor], name: str, contestant: str
) -> None:
    model.zero_grad()
    run = step(contestant, name, model, closure)
    if contestant == "fastadv":
        run()
        got = gradients(model)
        step("reference", name, model, closure)()
        want = gradients(model)
        assert torch.linalg.vector_norm(got - want) <= 1e-4 * torch.linalg.vector_norm(want)
    benchmark.group = f"training step, {name}"
    benchmark.extra_info.update(threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark.pedantic(run, setup=model.zero_grad, rounds=7, warmup_rounds=1)
