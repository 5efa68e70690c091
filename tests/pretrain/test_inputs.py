"""No document of a packed row sees another, nor does its loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv.jobs.errors import UserError
from fastadv.pretrain import model
from fastadv.pretrain.inputs import Inputs, losses, predicted
from fastadv.pretrain.loader import Batch, batch
from fastadv.pretrain.masking import Masking
from fastadv.pretrain.settings import Settings
from tests.pretrain import toy

OTHERS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "roberta": {
        **toy.CONFIGS["masked"],
        "model_type": "roberta",
        "max_position_embeddings": 66,
        "pad_token_id": 1,
    },
    "eager": {**toy.CONFIGS["causal"], "attn_implementation": "eager"},
    "mamba": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 2},
    "window": {**toy.CONFIGS["causal"], "model_type": "mistral", "sliding_window": 8},
}


def wanted(folder: Path, name: str) -> Settings:
    config = folder / f"{name}.json"
    config.write_text(json.dumps({**toy.CONFIGS, **OTHERS}[name]))
    objective = "masked" if name in ("masked", "roberta") else "causal"
    return toy.settings(folder, name, objective=objective, dtype="float64")


def answered(inputs: Inputs, one: Batch) -> tuple[Tensor, Tensor]:
    found = inputs.closure(one, 1.0)()
    return found["logits"], found["loss"]


def alone(one: Batch, row: int, document: int) -> Batch:
    """A document by itself, which begins a row."""
    inside = one.groups[row] == document
    ids, labels, positions, _ = (of[row][inside][None] for of in one[:4])
    return Batch(ids, labels, positions, torch.zeros_like(ids), one.rows[row : row + 1])


@pytest.mark.parametrize("name", ["causal", "masked", "gpt2", "roberta", "eager"])
def test_a_document_is_answered_as_if_it_were_alone(tmp_path: Path, name: str) -> None:
    settings = wanted(tmp_path, name)
    network = model.build(settings, toy.Numbers()).eval()
    masking = Masking(toy.Numbers(), 0) if settings.objective == "masked" else None
    one, inputs = batch(toy.Rows(24), [0, 1, 2], masking), Inputs(network, settings)
    logits, loss = answered(inputs, one)
    total, exact = torch.zeros((), dtype=torch.float64), 1e-6 if name == "eager" else 1e-12  # its softmax is float32
    for row in range(3):
        for document in range(int(one.groups[row].max()) + 1):
            own, part = answered(inputs, alone(one, row, document))
            torch.testing.assert_close(logits[row][one.groups[row] == document], own[0], rtol=0, atol=exact)
            total += part
    torch.testing.assert_close(loss, total, rtol=0, atol=100 * exact)


@pytest.mark.parametrize("name", ["mamba", "window"])
def test_a_model_in_which_documents_would_leak_is_refused(tmp_path: Path, name: str) -> None:
    settings = wanted(tmp_path, name)
    with pytest.raises(UserError, match=r"each other|--length 8"):
        Inputs(model.build(settings, toy.Numbers()), settings)


def test_losses_are_those_of_the_predicted_tokens(tmp_path: Path) -> None:
    settings = wanted(tmp_path, "causal")
    network, one = model.build(settings, toy.Numbers()), batch(toy.Rows(24), [4, 5], None)
    found = Inputs(network, settings).closure(one, 1.0)()
    by_hand = torch.zeros((), dtype=torch.float64)
    count = 0
    for row in range(2):
        for place in range(1, 24):
            if one.positions[row, place] > 0:
                by_hand -= found["logits"][row, place - 1].log_softmax(-1)[one.ids[row, place]]
                count += 1
    torch.testing.assert_close(found["loss"], by_hand)
    assert int(predicted(one.labels, causal=True)) == count


def test_losses_of_low_precision_are_wide() -> None:
    found = losses(torch.zeros(1, 2, 5, dtype=torch.bfloat16), torch.tensor([[3, -100]]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([5.0, 1.0]).log())
