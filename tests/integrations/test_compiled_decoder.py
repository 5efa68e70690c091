"""A decoder compiled as a whole: a pass whose graph waits while the perturbation moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import fastadv
from tests.support import assert_gradients, clear, gradients, seeded


def decoder() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            pad_token_id=0,
            use_cache=False,
        )
    )


def trained(backend: str | None, masked: bool) -> dict[str, Tensor]:
    """The gradients of two steps."""
    torch._dynamo.reset()
    model = seeded(decoder, dtype=torch.float32)  # in float64 the compiler keeps another tensor
    run: Any = model if backend is None else torch.compile(model, backend=backend)
    adv = fastadv.SMART(run)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    clear(model)
    for _ in range(2):
        ids, mask = torch.randint(1, 40, (2, 7), generator=generator), torch.ones(2, 7, dtype=torch.int64)
        mask[1, -2:] = 0
        adv.backward(lambda: run(ids, attention_mask=mask, labels=ids), mask=mask if masked else None)  # noqa: B023
    return gradients(model)


@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["mask", "no-mask"])
def test_smart(masked: bool) -> None:
    """The compiled graph of the clean pass may hold the perturbation itself, and compute again from it."""
    assert_gradients(trained("aot_eager", masked), trained(None, masked), 1e-4)


@pytest.mark.slow
def test_smart_by_inductor() -> None:
    assert_gradients(trained("inductor", masked=True), trained(None, masked=True), 1e-4)
