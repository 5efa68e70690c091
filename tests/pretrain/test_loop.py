"""The loop and its step: what waits for the device, what is left out, what is stopped, what a row of the log says."""

from __future__ import annotations

import math
import os
import signal
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.jobs.errors import Interrupted, UserError
from fastadv.jobs.log import read_log
from fastadv.pretrain import methods, step, trainer
from fastadv.pretrain.metrics import Meter
from fastadv.pretrain.optimizer import adamw, clip, update
from tests.pretrain import toy

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
ON_THE_HOST = {"_count", "_rows"}  # of batches that the device does not have yet


class Waits(TorchFunctionMode):
    """Lists where the loop reads values. A method's own reads are of the CPU alone, where nothing is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READS:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        ours = [frame for frame in traceback.extract_stack() if "/fastadv/" in frame.filename]
        if ours and "/fastadv/pretrain/" in ours[-1].filename and ours[-1].name not in ON_THE_HOST:
            self.places.append(f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].line}")


class WaitsInside(TorchDispatchMode):
    """Tells `Waits` of what torch reads by itself."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.waits.note()
        return func(*args, **(kwargs or {}))


def begun(folder: Path, method: str, *extra: str, **given: Any) -> tuple[step.Training, Iterator[Any]]:
    wanted = toy.settings(folder, **given)
    training = trainer.prepare(wanted, toy.Numbers(), method, methods.arguments(method, extra), toy.alone())
    return training, iter(toy.loader(wanted, toy.alone()))


@pytest.mark.parametrize("method", methods.offered())
def test_nothing_waits_for_the_device_between_two_rows_of_the_log(tmp_path: Path, method: str) -> None:
    training, batches = begun(tmp_path, method)
    meter = Meter(training, tmp_path / "log.jsonl", "phase", trainer.PeakMemory(torch.device("cpu")))
    meter.add(step.train_step(training, 0, next(batches)))
    with Waits() as waits, WaitsInside(waits):
        meter.add(step.train_step(training, 1, next(batches)))
    assert not waits.places
    with Waits() as waits, WaitsInside(waits):
        meter.log(2)
    assert any("_sums.tolist()" in place for place in waits.places)


def test_gradients_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    training, batches = begun(tmp_path, "plain")
    step.train_step(training, 0, next(batches))
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    moments = [state["exp_avg"].clone() for state in training.optimizer.state.values()]
    for parameter in training.model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0)
    next(iter(training.model.parameters())).grad.fill_(math.nan)
    update(training.optimizer, clip(training.optimizer, 1.0), 0.1)
    assert all(torch.equal(one, now) for one, now in zip(before, training.model.parameters(), strict=True))
    after = [state["exp_avg"] for state in training.optimizer.state.values()]
    assert all(torch.equal(one, now) for one, now in zip(moments, after, strict=True))
    figures = step.train_step(training, 1, next(batches))
    assert bool(figures.norm.isfinite())
    assert not all(torch.equal(one, now) for one, now in zip(before, training.model.parameters(), strict=True))


def test_a_training_that_is_not_finite_twice_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, bad = step.train_step, []

    def broken(*args: Any, **given: Any) -> step.Figures:
        figures = whole(*args, **given)
        return figures._replace(norm=figures.norm * math.nan) if args[1] in bad else figures

    monkeypatch.setattr("fastadv.pretrain.loop.train_step", broken)
    bad[:] = [4]
    trained = toy.train(tmp_path, toy.settings(tmp_path), toy.alone(), "plain", phase="once")
    assert trained.left_out == 1
    rows = read_log(tmp_path / "log.jsonl", "once")
    assert [row["left_out"] for row in rows] == [0, 1, 0, 0]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    bad[:] = [4, 5]
    with pytest.raises(UserError, match="2 of the last 3 steps"):
        toy.train(tmp_path, toy.settings(tmp_path), toy.alone(), "plain", phase="twice")


def test_ctrl_c_saves_and_a_resumed_training_is_as_if_nothing_had_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = toy.weights(toy.train(tmp_path, toy.settings(tmp_path), toy.alone(), phase="whole"))
    original = step.train_step

    def interrupted(training: step.Training, number: int, *args: Any, **given: Any) -> step.Figures:
        if number == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return original(training, number, *args, **given)

    with monkeypatch.context() as patched:
        patched.setattr("fastadv.pretrain.loop.train_step", interrupted)
        with pytest.raises(Interrupted, match="stopped after step 7 of 10"):  # told in step 5, heard in step 6
            toy.train(tmp_path, toy.settings(tmp_path), toy.alone())
    resumed = toy.train(tmp_path, toy.settings(tmp_path), toy.alone(), resume=True)
    assert toy.difference(whole, toy.weights(resumed)) == 0
    rows = {phase: read_log(tmp_path / "log.jsonl", phase) for phase in ("whole", "phase")}
    assert [row["step"] for row in rows["phase"]] == [3, 6, 7, 9, 10]
    last = [
        {**row[-1], **dict.fromkeys(("phase", "seconds", "tokens_per_second", "attack_share", "peak_memory"))}
        for row in rows.values()
    ]
    assert last[0] == last[1]


def test_a_row_of_the_log(tmp_path: Path) -> None:
    trained = toy.train(tmp_path, toy.settings(tmp_path), toy.alone(), "pgd")
    rows = read_log(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    assert all(row["adv_loss"] > row["loss"] for row in rows)
    assert all(0.4 < row["attack_share"] < 0.9 for row in rows[1:])
    assert trained.tokens == rows[-1]["tokens"] and trained.seconds == pytest.approx(
        sum(row["seconds"] for row in rows)
    )


def test_weight_decay_is_on_matrices(tmp_path: Path) -> None:
    training, _ = begun(tmp_path, "plain", weight_decay=0.3)
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    decays, spared = (
        [names[id(p)] for p in group["params"]] for group in adamw(training.model, training.settings).param_groups
    )
    assert all("proj" in name for name in decays)
    assert all("norm" in name or "embed" in name for name in spared)
    assert len(decays) + len(spared) == len(names)


def test_relative_radii_follow_the_embedding(tmp_path: Path) -> None:
    training, batches = begun(tmp_path, "fgm", "--epsilon", "0.5")
    table: Any = training.model.get_input_embeddings()  # type: ignore[operator]
    assert training.method is not None
    norms = []
    for number in (0, 99, 100):
        step.train_step(training, number, next(batches))
        norms.append(float(training.method.perturbation_norm))
        if not number:
            unit = float(table.weight.detach().norm(dim=1).mean())
        with torch.no_grad():
            table.weight.mul_(3)
    assert norms == pytest.approx([0.5 * unit, 0.5 * unit, 0.5 * 9 * unit], rel=0.03)  # and a step of 1e-3 each
