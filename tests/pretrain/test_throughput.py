"""What a step costs is measured of every method, and the page shows the committed figures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import bare_passes, pretrain_throughput
from fastadv.pretrain import data, methods, trainer
from fastadv.pretrain.processes import Processes
from fastadv.pretrain.settings import PLAIN_ONLY, Settings
from fastadv.pretrain.step import train_step
from tests.pretrain.job import config, text


def tiny() -> Settings:
    size: dict[str, Any] = {"vocab_size": 300, "length": 32, "batch_tokens": 128, "micro_batch": 2}
    return Settings(data=str(text(Path("text.txt"))), model=str(config(Path("config.json"))), **size)


def test_every_method_is_measured_beside_its_passes(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        result = pretrain_throughput.main(["--rounds", "1", "--warmup", "0"], tiny())
    finally:
        torch.set_num_threads(threads)
    assert set(methods.offered()) == {case.method for case in pretrain_throughput.CASES}
    for found in result["cases"]:
        for clock in ("cpu", "wall"):
            assert found[clock]["step_ms"]["median"] > 0 < found[clock]["bare_ms"]["median"]
    assert result["cases"][0]["cpu"]["ratio"] == {"median": 1, "iqr": 0}
    assert "| `yopo` (2 by 2) |" in capsys.readouterr().out


class Counted:
    """Passes of a training's model: how often its embedding is called, and its last block."""

    def __init__(self, training: Any) -> None:
        self.begun = self.ended = 0
        training.model.get_input_embeddings().register_forward_pre_hook(lambda *_: self._count("begun"))
        training.model.lm_head.register_forward_pre_hook(lambda *_: self._count("ended"))

    def _count(self, name: str) -> None:
        setattr(self, name, getattr(self, name) + 1)


@pytest.mark.parametrize("case", pretrain_throughput.CASES, ids=lambda case: case.title)
def test_bare_passes_are_as_many_as_the_methods(case: pretrain_throughput.Case) -> None:
    settings = tiny()
    read = data.prepare(settings, Path("run"))
    alone = Processes(torch.device("cpu"))
    options = methods.arguments(case.method, case.extra)
    ours = trainer.prepare(settings, read.tokenizer, case.method, options, alone)
    theirs = trainer.prepare(settings, read.tokenizer, PLAIN_ONLY, methods.arguments(PLAIN_ONLY), alone)
    method, bare = Counted(ours), Counted(theirs)
    by_hand = bare_passes.Bare(theirs, iter(read.loader()), case.passes, case.every)
    for step, batches in zip(range(case.every), read.loader()):  # noqa: B905  # the loader is endless
        train_step(ours, step, batches)
        by_hand.step()
    assert (method.begun, method.ended) == (bare.begun, bare.ended)
    micro_batches = settings.batch_tokens // settings.length // settings.micro_batch
    assert bare.ended == micro_batches * (case.full + case.probes + case.every - 1)


def test_a_step_of_full_passes_alone_is_plain_training() -> None:
    settings = dataclasses.replace(tiny(), dtype="float64")
    read = data.prepare(settings, Path("run"))
    alone, plain = Processes(torch.device("cpu")), methods.arguments(PLAIN_ONLY)
    ours, theirs = (trainer.prepare(settings, read.tokenizer, PLAIN_ONLY, plain, alone) for _ in range(2))
    by_hand = bare_passes.Bare(theirs, iter(read.loader()), bare_passes.full)
    for step, batches in zip(range(3), read.loader()):  # noqa: B905
        train_step(ours, step, batches)
        by_hand.step()
    for one, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_page_shows_the_committed_figures() -> None:
    results = json.loads(pretrain_throughput.RESULT.read_text(encoding="utf-8"))
    assert pretrain_throughput.section(results) in pretrain_throughput.PAGE.read_text(encoding="utf-8")
