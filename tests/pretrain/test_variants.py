"""Activation checkpointing, compiled blocks and bfloat16 train as training without them does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadv.jobs.log import read_log
from fastadv.pretrain import trainer
from fastadv.pretrain.blocks import blocks
from tests.pretrain import toy


@pytest.mark.parametrize("method", ["pgd", "yopo"])
def test_activation_checkpointing_changes_nothing(tmp_path: Path, method: str) -> None:
    found = []
    for on in (False, True):
        wanted = toy.settings(tmp_path, max_steps=3, activation_checkpointing=on)
        found.append(toy.weights(toy.train(tmp_path, wanted, toy.alone(), method, phase=str(on))))
    assert toy.difference(*found) < 1e-13


def test_checkpointing_computes_blocks_again(tmp_path: Path) -> None:
    ran = []
    wanted = toy.settings(tmp_path, max_steps=1, activation_checkpointing=True)
    training = trainer.prepare(wanted, toy.Numbers(), "plain", {}, toy.alone())
    first: Any = blocks(training.model)[0]
    first.self_attn.register_forward_hook(lambda *_: ran.append(1))
    one = next(iter(toy.loader(wanted, toy.alone())))[0]
    loss = training.inputs.closure(one, 1.0)()["loss"]
    assert len(ran) == 1
    loss.backward()
    assert len(ran) == 2


@pytest.mark.slow
def test_compiled_blocks_of_the_default_model(tmp_path: Path) -> None:
    found = []
    torch._dynamo.reset()
    for on in (False, True):
        wanted = toy.settings(tmp_path, max_steps=2, compile=on, dtype="float32", micro_batch=4, log_every=1)
        wanted = replace(wanted, model="small")
        toy.train(tmp_path, wanted, toy.alone(), phase=str(on))
        found.append(read_log(tmp_path / "log.jsonl", str(on)))
    for eager, compiled in zip(*found, strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-5)
        assert compiled["grad_norm"] == pytest.approx(eager["grad_norm"], rel=1e-3)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 4  # full passes, and those of the first block, whose input needs no gradient or does


@pytest.mark.parametrize("method", ["plain", "freelb", "smart", "vat"])
def test_bfloat16_is_near_float32(tmp_path: Path, method: str) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        wanted = toy.settings(tmp_path, max_steps=3, dtype=dtype)
        training = toy.train(tmp_path, wanted, toy.alone(), method, phase=dtype)
        assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}
        found.append(read_log(tmp_path / "log.jsonl", dtype)[-1])
    wide, low = found
    assert low["loss"] == pytest.approx(wide["loss"], rel=0.01) and low["loss"] != wide["loss"]
    assert low["grad_norm"] == pytest.approx(wide["grad_norm"], rel=0.1)
    assert low["adv_loss"] == pytest.approx(wide["adv_loss"], rel=0.3)
