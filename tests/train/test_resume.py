"""A run that was interrupted, and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastadv.cli import main
from fastadv.jobs.log import read_log
from fastadv.jobs.method_options import methods
from fastadv.train import phase, run, saved_model
from fastadv.train.log import StopTraining
from fastadv.train.run import to_resume
from tests.small_disk import enlarge, small_disk
from tests.train.command import FAST, main_ok, refused, train

MORE = {"freeat": ["--replays", "3"]}  # step 4 is in the middle of a batch's replays


@pytest.mark.parametrize(("method", "stopped_in"), [("fgm", "plain"), *((name, "adversarial") for name in methods())])
def test_an_interrupted_run_goes_on_where_it_was(
    encoder: Path,
    table: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    stopped_in: str,
) -> None:
    """With dropout and several epochs: the models are bit for bit those of a run that nobody stopped."""
    chosen = ["--method", method, *MORE.get(method, [])]
    whole = train(encoder, table, "whole", *chosen)

    at_step = StopTraining.on_step_end

    def interrupt(self: StopTraining, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if Path(args.output_dir).name == stopped_in and state.global_step == 4:
            self._stop(2, None)  # what Ctrl-C calls
        at_step(self, args, state, control, **rest)

    command = ["train", "--model", str(encoder), "--data", str(table), "--output-dir", "broken", *FAST, *chosen]
    with monkeypatch.context() as patch:
        patch.setattr(StopTraining, "on_step_end", interrupt)
        with pytest.raises(SystemExit) as left:
            main(command)
    assert left.value.code == 130
    message = capsys.readouterr().err
    assert f"{stopped_in}: stopped after step 4 of 9" in message
    assert "fastadv train --resume --output-dir broken" in message
    assert "an unfinished run: --resume continues it" in refused(capsys, *command)
    assert "leave out --epsilon" in refused(capsys, "train", "--resume", "--output-dir", "broken", "--epsilon", "1")
    main_ok("train", "--resume", "--output-dir", "broken")
    for name in ("plain", "adversarial"):
        a, b = (load_file(run / name / "model.safetensors") for run in (whole, Path("broken")))
        assert all(torch.equal(a[key], b[key]) for key in a), name
        rows = [
            [(r["step"], r["loss"]) for r in read_log(run / "log.jsonl", name) if "loss" in r]
            for run in (whole, Path("broken"))
        ]
        assert set(rows[0]) - set(rows[1]) <= {rows[0][0]}, "one interval was logged in two parts"
        seconds = [s for row in read_log(Path("broken/log.jsonl"), name) for s in row["step_seconds"]]
        assert len(seconds) == 9


def test_resume_measures_a_model_that_is_trained_already(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(phase, "measure", interrupted)
        with pytest.raises(SystemExit) as left:
            main(["train", "--model", str(encoder), "--data", str(table), "--output-dir", "runs/a", *FAST])
    assert left.value.code == 130
    weights = Path("runs/a/plain/model.safetensors")
    before = weights.stat().st_mtime_ns
    main_ok("train", "--resume")
    assert weights.stat().st_mtime_ns == before
    assert json.loads(Path("runs/a/result.json").read_text())["models"]["adversarial"]["accuracy"]


@pytest.mark.slow
def test_a_model_that_is_half_saved_is_none(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped between the last step and phase.json, with a line of the log cut off; a dtype among the arguments."""
    chosen = ["--method", "pgd", "--probe-dtype", "bfloat16", "--max-steps", "3", "--logging-steps", "9"]
    whole = train(encoder, table, "whole", *chosen)

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    command = ["train", "--model", str(encoder), "--data", str(table), "--output-dir", "run", *FAST, *chosen]
    for place in ("sync_tree", "write"):
        with monkeypatch.context() as patch:
            if place == "sync_tree":
                patch.setattr(saved_model.files, place, interrupted)
            else:
                patch.setattr(run, "write_json", interrupted)  # radius.json is there: the next is phase.json
            with pytest.raises(SystemExit) as left:
                main(command)
        assert left.value.code == 130
        assert Path("run/plain/config.json").exists() == (place == "write")
        command = ["train", "--resume", "--output-dir", "run"]
        with Path("run/log.jsonl").open("ab") as log:
            log.write('{"phase": "plain", "é'.encode()[:-1])
    main_ok(*command)
    assert "plain: goes on from run/plain/checkpoint-3" in capsys.readouterr().err
    assert {path.relative_to("run") for path in Path("run").rglob("*")} == {
        path.relative_to(whole) for path in whole.rglob("*")
    }
    for name in ("plain", "adversarial"):
        a, b = (Path(one, name, "model.safetensors").read_bytes() for one in ("whole", "run"))
        assert a == b, name
        assert len([s for row in read_log(Path("run/log.jsonl"), name) for s in row["step_seconds"]]) == 3


@pytest.mark.slow
def test_a_full_disk_is_one_line(encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever it was that found no room: the command says so, and goes on when there is some."""
    chosen = ["--max-steps", "4", "--save-steps", "2", "--save-strategy", "steps", "--save-total-limit", "1"]
    train(encoder, table, "whole", *chosen)
    size = sum(path.stat().st_size for path in Path("whole/plain/checkpoint-4").iterdir())
    with small_disk(Path("disk"), int(1.5 * size)) as disk:
        command = ["train", "--model", str(encoder), "--data", str(table), "--output-dir", "disk/run", *FAST, *chosen]
        for room in (2.5, 3.5, 8.0):
            capsys.readouterr()
            with pytest.raises(SystemExit) as left:
                main(command)
            assert left.value.code == 2
            *_, error = capsys.readouterr().err.strip().splitlines()
            assert error.startswith("error: the disk of disk/run is full; what was finished is kept. Make room, then: ")
            assert error.endswith("fastadv train --resume --output-dir disk/run")
            command = ["train", "--resume", "--output-dir", "disk/run"]
            enlarge(disk, int(room * size))
        main_ok(*command)
        for name in ("plain", "adversarial"):
            a, b = (Path(one, name, "model.safetensors").read_bytes() for one in ("whole", "disk/run"))
            assert a == b, name


@pytest.mark.slow
def test_a_checkpoint_without_the_methods_state_is_passed_over(
    encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a kill once left: all of the Trainer's files, and not the method's. The training begins afresh."""
    chosen = ["--method", "freeat", "--max-steps", "4", "--save-steps", "3", "--save-strategy", "steps"]
    train(encoder, table, "whole", *chosen)
    train(encoder, table, "run", *chosen)
    for file in ("result.json", "adversarial/phase.json", *Path("run/adversarial").glob("checkpoint-*/adversary.*")):
        Path("run", file).unlink() if isinstance(file, str) else file.unlink()
    main_ok("train", "--resume", "--output-dir", "run")
    error = capsys.readouterr().err
    assert "checkpoint-4 is passed over: it has no adversary.safetensors, the method's state" in error
    assert "adversarial: no checkpoint is whole: begins afresh" in error
    a, b = (Path(one, "adversarial/model.safetensors").read_bytes() for one in ("whole", "run"))
    assert a == b


def test_a_run_does_not_go_on_with_other_data(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(phase, "train", interrupted)
    with pytest.raises(SystemExit):
        main(["train", "--model", str(encoder), "--data", str(table), "--output-dir", "run", *FAST])
    table.write_text(table.read_text() + "a fine film was here,good\n" * 9 + "and a dull one,bad\n", encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        main(["train", "--resume", "--output-dir", "run"])
    assert left.value.code == 2
    assert "or its split has changed since run began" in capsys.readouterr().err


def test_settings_of_an_earlier_version_can_be_resumed() -> None:
    """settings.json as 0.1.0 wrote it: its keys stay, whatever the options are called."""
    data = {"data": "texts.csv", "test_data": None, "text_column": "text", "label_column": "label"}
    more = {"group_column": None, "test_fraction": 0.2, "train_samples": None}
    saved = {
        "model": "encoder",
        "data": {**data, **more},
        "method": "pgd",
        "max_length": 128,
        "head_dropout": 0.1,
        "attack_radii": [0.2, 0.1],
        "attack_steps": 3,
        "attack_samples": 500,
        "extra": ["--steps", "2", "--max-steps", "4"],
    }
    folder = Path("runs/old")
    folder.mkdir(parents=True)
    (folder / "settings.json").write_text(json.dumps({"command": "fastadv train --attack-steps 3", "settings": saved}))
    found, settings, command = to_resume(Path("runs"), None)
    assert (found, command) == (folder, "fastadv train --attack-steps 3")
    assert (settings.attack_radii, settings.attack_steps, settings.data.data) == ((0.2, 0.1), 3, "texts.csv")
    assert settings.extra == ("--steps", "2", "--max-steps", "4")


def test_resume_with_a_checkpoint_of_another_model(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step = StopTraining.on_step_end

    def interrupt(self: StopTraining, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.requested = True
        at_step(self, args, state, control, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(StopTraining, "on_step_end", interrupt)
        with pytest.raises(SystemExit):
            main(["train", "--model", str(encoder), "--data", str(table), "--output-dir", "run", *FAST])
    config = Path("run/plain/checkpoint-1/config.json")
    config.write_text(json.dumps({"model_type": "bert"}))
    assert "a checkpoint of another model (bert)" in refused(capsys, "train", "--resume", "--output-dir", "run")
