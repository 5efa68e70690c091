"""Readers copy examples, not sweeps: what the pages and docstrings construct trains MiniLM."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastadv
from fastadv.train.data import DataSettings, load
from fastadv.train.model import DEFAULT, MeanPoolClassifier, build, resolve, tokenizer_of
from tests.documented import Construction, documented

pytestmark = pytest.mark.slow

ROWS, LONGEST = 16, 10  # snippets, and their tokens
STEPS, RATE = 6, 3e-4


@functools.cache
def minilm() -> MeanPoolClassifier:
    torch.manual_seed(0)
    model = build(resolve(DEFAULT), ["fresh", "rotten"], head_dropout=0.1).train()
    model.get_input_embeddings().requires_grad_(False)  # 12 of 22 million parameters, whose update costs a forward
    return model


@functools.cache
def snippets() -> dict[str, Tensor]:
    """As many fresh ones as rotten ones."""
    tokenizer, chosen = tokenizer_of(resolve(DEFAULT)), ([], [])
    for sample in load(DataSettings()).train:
        ids = tokenizer(sample.text)["input_ids"]
        if len(ids) <= LONGEST and len(chosen[sample.label]) < ROWS // 2:
            chosen[sample.label].append(ids)
    batch = dict(tokenizer.pad({"input_ids": chosen[0] + chosen[1]}, return_tensors="pt"))
    return {**batch, "labels": torch.arange(ROWS) // (ROWS // 2)}


def refusal(construction: Construction) -> str | None:
    """Fit the snippets; why the model is no good, None where it is."""
    model, batch = copy.deepcopy(minilm()), snippets()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    torch.manual_seed(0)
    with construction.around(model) as adv:
        if isinstance(adv, fastadv.BregmanProximal):
            adv.attach(optimizer)
        for _ in range(STEPS):
            adv.backward(lambda: model(**batch), mask=batch["attention_mask"])
            optimizer.step()
            optimizer.zero_grad()
    answers = model.eval()(**batch).logits.argmax(-1)
    right = float((answers == batch["labels"]).float().mean())
    if len(answers.unique()) == 1:
        return "answers one class"
    return None if right >= 0.75 else f"is right in {right:.0%} of what it was trained on"


def test_every_documented_construction_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    constructions = documented(tmp_path)
    assert {"FGM(epsilon=0.1, scope=sample)", "PGD(epsilon=0.1, scope=sample, step_size=0.05)"} <= set(constructions)
    refused = {shown: why for shown, one in constructions.items() if (why := refusal(one))}
    assert not refused


BAD: list[tuple[Any, dict[str, Any]]] = [
    (fastadv.FGM, {"epsilon": 0.5, "scope": "sample"}),
    (fastadv.PGD, {"epsilon": 0.3, "step_size": 0.15, "scope": "sample"}),
]


@pytest.mark.parametrize(("method", "options"), BAD, ids=["FGM 0.5", "PGD 0.3"])
def test_a_radius_that_trains_nothing_is_refused(method: Any, options: dict[str, Any]) -> None:
    assert refusal(Construction(method, (), options))
