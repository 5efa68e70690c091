"""A checkpoint is whole or does not count, whenever its save ends."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, Trainer

import fastadv
from fastadv.integrations import checkpoints
from fastadv.integrations.checkpoints import CheckpointError
from fastadv.integrations.transformers import AdversarialTrainer
from tests.integrations.by_hand import arguments, bert, samples
from tests.small_disk import enlarge, small_disk

FREEAT = (fastadv.FreeAT, {"epsilon": 0.05, "replays": 2})


def trainer_of(folder: Path, adversary: Any = FREEAT, **changes: Any) -> AdversarialTrainer:
    """Four steps of FreeAT, whose perturbation is in its state, with a checkpoint after each."""
    args = arguments(folder, **{"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, **changes})
    return AdversarialTrainer(model=bert(), args=args, train_dataset=samples(4), adversary=adversary)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    trainer_of(folder).train()
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The checkpoints after steps 1 to 3 of it."""
    shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoint-4")
    return tmp_path / "copy"


def assert_goes_on(folder: Path, whole: Path) -> None:
    """Resumed, the training is bit for bit the one that nobody stopped."""
    trainer_of(folder).train(resume_from_checkpoint=True)
    for name in ("model.safetensors", "adversary.safetensors"):
        got, want = (load_file(run / "checkpoint-4" / name) for run in (folder, whole))
        assert all(torch.equal(got[key], want[key]) for key in want), name


# Whenever a save ends: each of these writes a part of a checkpoint, or deletes one.
PLACES = ["save_more", "save_model", "_save_optimizer_and_scheduler", "_save_rng_state", "_publish", "_rotate"]


@pytest.mark.parametrize(("place", "after"), [*((place, False) for place in PLACES), ("_publish", True)])
def test_a_save_that_is_interrupted(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, place: str, after: bool
) -> None:
    """An older checkpoint is there until the new one is whole, also where one alone is kept."""
    part = getattr(AdversarialTrainer, place)

    def interrupted(self: AdversarialTrainer, *args: Any, **named: Any) -> None:
        if self.state.global_step < 3:
            part(self, *args, **named)
            return
        if after:
            part(self, *args, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AdversarialTrainer, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer_of(tmp_path, save_total_limit=1).train()
    assert checkpoints.all_in(tmp_path)
    assert all(checkpoints.flaw(one) is None and (one / "adversary.safetensors").exists() for one in tmp_path.iterdir())
    assert_goes_on(tmp_path, whole)


def test_a_process_that_is_killed_leaves_no_half_checkpoint_by_its_name(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends inside of the save, with no handler run; the next training removes what it left."""
    process = os.fork()
    if process == 0:
        try:
            state = Trainer._save_rng_state

            def killed(self: Any, folder: str) -> None:
                if self.state.global_step == 3:
                    os.kill(os.getpid(), 9)
                state(self, folder)

            Trainer._save_rng_state = killed
            trainer_of(tmp_path).train()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -9
    assert (tmp_path / "unfinished/checkpoint-3").exists()
    assert {one.name for one in checkpoints.all_in(tmp_path)} == {"checkpoint-1", "checkpoint-2"}
    assert_goes_on(tmp_path, whole)
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.parametrize("name", [
    "trainer_state.json", "model.safetensors", "adversary.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth",
])  # fmt: skip
@pytest.mark.parametrize("left", [None, 0, 0.5], ids=["missing", "empty", "half"])
def test_a_checkpoint_that_misses_something_is_passed_over(copy: Path, name: str, left: float | None) -> None:
    """As a Trainer without these saves leaves it, or a disk: which, and why, is said."""
    file = copy / "checkpoint-3" / name
    content = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(content[: int(left * len(content))])
    trainer = trainer_of(copy)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 cannot be resumed from: it.*resume_from_checkpoint=True"):
        trainer.train(resume_from_checkpoint=str(file.parent))
    chosen, (told,) = trainer.newest()
    assert chosen == copy / "checkpoint-2"
    assert f"{file.parent} is passed over: it" in told


def test_the_newest_whole_checkpoint_is_resumed_from(copy: Path, whole: Path) -> None:
    (copy / "checkpoint-3/adversary.safetensors").unlink()
    with pytest.warns(UserWarning, match="checkpoint-3 is passed over: it has no adversary.safetensors"):
        assert_goes_on(copy, whole)


def test_where_no_checkpoint_is_whole(copy: Path) -> None:
    for checkpoint in copy.iterdir():
        (checkpoint / "adversary.safetensors").unlink()
    with (
        pytest.warns(UserWarning, match="a plain training saved it"),
        pytest.raises(ValueError, match=r"No valid checkpoint found in output directory .*: train afresh"),
    ):
        trainer_of(copy).train(resume_from_checkpoint=True)


def test_the_state_of_another_method_is_refused(copy: Path) -> None:
    trainer = trainer_of(copy, (fastadv.FGM, {"epsilon": 0.1}))
    with pytest.raises(CheckpointError, match="is the state of FreeAT, and this method is FGM: train on with that"):
        trainer.train(resume_from_checkpoint=True)
    file = copy / "checkpoint-3/adversary.safetensors"
    save_file({"calls": torch.tensor(3), "attacked": torch.tensor(3)}, file)  # as earlier versions did, without a name
    with pytest.raises(CheckpointError, match="is no state of FreeAT"):
        trainer_of(copy).train(resume_from_checkpoint=True)


def test_another_number_of_processes(copy: Path) -> None:
    state = copy / "checkpoint-3/adversary.safetensors"
    state.rename(state.with_name("adversary-1.safetensors"))
    with pytest.raises(CheckpointError, match=r"another number of processes saved it \(adversary-1.safetensors\)"):
        trainer_of(copy).train(resume_from_checkpoint=str(state.parent))


def test_a_checkpoint_replaces_one_that_is_not_whole(copy: Path) -> None:
    """Its name is taken by what an earlier training left."""
    (copy / "checkpoint-3/optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="passed over: its optimizer is missing"):
        trainer_of(copy, save_total_limit=2).train(resume_from_checkpoint=True)
    assert {one.name for one in copy.iterdir()} == {"checkpoint-3", "checkpoint-4"}
    assert all(checkpoints.flaw(one) is None for one in copy.iterdir())


def test_the_best_checkpoint_is_named_and_kept(tmp_path: Path) -> None:
    """The Trainer writes to another folder, and must not look for the best one there."""
    trainer = AdversarialTrainer(
        model=bert(),
        args=arguments(
            tmp_path, num_train_epochs=2, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
            load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True, save_total_limit=1,
        ),
        train_dataset=samples(4), eval_dataset=samples(4), adversary=FREEAT, callbacks=[EarlyStoppingCallback(9)],
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-1"), "the loss falls, and the highest was wanted"
    saved = json.loads((tmp_path / "checkpoint-1/trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best
    weights = load_file(tmp_path / "checkpoint-1/model.safetensors")
    assert torch.equal(weights["classifier.weight"], trainer.model.classifier.weight)


def test_what_was_told_is_told_after_resuming_too(copy: Path) -> None:
    state = copy / "checkpoint-3/adversary.safetensors"
    tensors = load_file(state)
    assert float(tensors["collapse.counts"].sum()) == 2 * 3 * 2, "answers and labels of three steps of two rows"
    save_file(tensors, state, {"method": "FreeAT", "notes": json.dumps({"warnings": ["no radius"], "collapse": []})})
    trainer = trainer_of(copy)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.warnings == ["no radius"]


def test_a_disk_that_is_full_keeps_the_older_checkpoint(tmp_path: Path, whole: Path) -> None:
    size = sum(file.stat().st_size for file in (whole / "checkpoint-1").iterdir())
    with small_disk(tmp_path / "disk", int(1.5 * size)) as disk:
        with pytest.raises(OSError, match=r"the disk is full: .*checkpoint-2 is not saved, .* Make room"):
            trainer_of(disk).train()
        assert [one.name for one in disk.iterdir()] == ["checkpoint-1"]
        enlarge(disk, 8 * size)
        assert_goes_on(disk, whole)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_write_one_checkpoint(tmp_path: Path) -> None:
    """Each with its own state of the method; it has its name when both have written theirs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    script = Path(__file__).with_name("two_processes.py")
    ended = subprocess.run([*command, script, tmp_path], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {one.name for one in (tmp_path / "whole").iterdir()} == {"checkpoint-3", "checkpoint-4"}
    states = {one.name for one in (tmp_path / "whole/checkpoint-4").glob("adversary*")}
    assert states == {"adversary-0.safetensors", "adversary-1.safetensors"}
