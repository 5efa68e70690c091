"""Readers copy examples, not sweeps: what the pages and docstrings construct trains MiniLM.

Its first three layers, for 24 steps of sixteen short snippets: enough to tell a radius at which FGM and PGD answer
one class for everything from one at which they learn.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

import fastadv
from fastadv.train.data import DataSettings, Sample, load
from fastadv.train.model import DEFAULT, MeanPoolClassifier, build, resolve, tokenizer_of
from tests.documented import Construction, documented

pytestmark = pytest.mark.slow

LAYERS, LONGEST = 3, 12  # of MiniLM, and tokens of a snippet
STEPS, ROWS, RATE = 24, 16, 3e-4
UNSEEN = 128
LEAST_SHARE = 0.05  # of the answers that have to be of either class
LEAST_RIGHT = 0.58


@functools.cache
def minilm() -> MeanPoolClassifier:
    torch.manual_seed(0)
    model = build(resolve(DEFAULT), ["fresh", "rotten"], head_dropout=0.1).train()
    model.encoder.encoder.layer = model.encoder.encoder.layer[:LAYERS]
    model.get_input_embeddings().requires_grad_(False)  # half of the parameters, whose update costs a forward
    return model


@functools.cache
def batches() -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Those to train on, and one that no training has seen."""
    tokenizer, data = tokenizer_of(resolve(DEFAULT)), load(DataSettings())
    collate = DataCollatorWithPadding(tokenizer)

    def short(samples: list[Sample], count: int) -> list[dict[str, Any]]:
        encoded = ({**tokenizer(sample.text), "label": sample.label} for sample in samples)
        fitting = (one for one in encoded if len(one["input_ids"]) <= LONGEST)
        return [dict(one) for one, _ in zip(fitting, range(count), strict=False)]

    train = short(data.train, STEPS * ROWS)
    cut = [dict(collate(train[start : start + ROWS])) for start in range(0, len(train), ROWS)]
    return [inputs(batch) for batch in cut], inputs(dict(collate(short(data.test, UNSEEN))))


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}


def refusal(construction: Construction) -> str | None:
    """Train; say why the model is no good, None where it is."""
    model, (training, unseen) = copy.deepcopy(minilm()), batches()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    torch.manual_seed(0)
    with construction.around(model) as adv:
        if isinstance(adv, fastadv.BregmanProximal):
            adv.attach(optimizer)
        replays = getattr(adv, "replays", 1)
        for batch in [one for one in training[: STEPS // replays] for _ in range(replays)]:
            adv.backward(lambda batch=batch: model(**batch), mask=batch["attention_mask"])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        answers = model.eval()(**unseen).logits.argmax(-1)
    share, right = float(answers.float().mean()), float((answers == unseen["labels"]).float().mean())
    if min(share, 1 - share) < LEAST_SHARE:
        return f"gives one answer in {max(share, 1 - share):.0%}"
    return None if right >= LEAST_RIGHT else f"is right in {right:.0%} alone"


def test_every_documented_construction_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.chdir(tmp_path)
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
    assert refusal(Construction(method, options))
