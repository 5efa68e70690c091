"""Checkpoints: what is kept, what is passed over, what is left of a save that was killed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fastadv.jobs.errors import UserError
from fastadv.pretrain import checkpoint, generators
from tests.pretrain import toy

CPU = torch.device("cpu")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 4, 8 and 10."""
    toy.train(tmp_path, toy.settings(tmp_path, save_every=4, keep=3), toy.alone())
    return tmp_path


def test_the_newest_are_kept(tmp_path: Path) -> None:
    toy.train(tmp_path, toy.settings(tmp_path, save_every=2, keep=2), toy.alone(), "plain")
    found = sorted(one.name for one in (tmp_path / "checkpoints" / "phase").iterdir())
    assert found == ["step-00000008", "step-00000010"]
    state = json.loads((tmp_path / "checkpoints" / "phase" / found[0] / "state.json").read_text())
    assert (state["step"], state["world"], state["method"], state["loader"]["rows"]) == (8, 1, "plain", 64)


def test_damaged_ones_are_passed_over_and_leftovers_removed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run / "checkpoints" / "phase"
    whole = toy.weights(toy.train(run, toy.settings(run, save_every=4), toy.alone(), resume=True))
    (place / "step-00000010" / "state.json").write_text('{"step": 10')
    data = next((place / "step-00000008").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    (place / "unfinished-step-00000012").mkdir()
    trained = toy.train(run, toy.settings(run, save_every=4), toy.alone(), resume=True)
    said = capsys.readouterr().err
    assert "step-00000010 is passed over: its state.json is cut off or damaged" in said
    assert f"step-00000008 is passed over: its {data.name} is cut off or damaged" in said
    assert "goes on from" in said and "step-00000004" in said
    assert not list(place.glob("unfinished*"))
    assert toy.difference(whole, toy.weights(trained)) == 0


@pytest.mark.parametrize("file", ["state.json", ".metadata"])
def test_a_missing_file_is_named(run: Path, file: str) -> None:
    place = run / "checkpoints" / "phase"
    (place / "step-00000010" / file).unlink()
    found = checkpoint.newest(place)
    assert found.folder == place / "step-00000008"
    assert file in found.passed_over[0]


def test_another_method_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="is of method freelb, not pgd"):
        toy.train(run, toy.settings(run), toy.alone(), "pgd", resume=True)


def test_what_is_saved_is_what_was_there_when_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training goes on while a checkpoint is written."""
    from torch.distributed.checkpoint import filesystem

    wanted = toy.settings(tmp_path, max_steps=4, warmup_steps=0)
    whole = toy.weights(toy.train(tmp_path, wanted, toy.alone(), phase="whole"))
    training: list[checkpoint.Training] = []
    begin, write = checkpoint._write, filesystem._write_item

    def begun(folder: Path, one: checkpoint.Training) -> object:
        training[:] = [one]
        return begin(folder, one)

    def late(*args: object) -> object:
        with torch.no_grad():
            for parameter in training[0].model.parameters():
                parameter.add_(1.0)
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint, "_write", begun)
    monkeypatch.setattr(filesystem, "_write_item", late)
    toy.train(tmp_path, wanted, toy.alone())
    found = toy.train(tmp_path, wanted, toy.alone(), resume=True)
    assert toy.difference(whole, toy.weights(found)) == 0


def test_generators_go_on() -> None:
    state = generators.save(CPU)
    drawn = [torch.rand(3).tolist(), random.random(), np.random.random()]  # noqa: NPY002
    generators.restore(state, CPU)
    assert drawn == [torch.rand(3).tolist(), random.random(), np.random.random()]  # noqa: NPY002
