"""A run's folder has one run, and one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastadv.cli import main
from fastadv.jobs import run_folder
from fastadv.jobs.errors import UserError
from fastadv.train.run import to_resume
from tests.train.command import refused

RUNS = Path("runs")
DATA = {"data": "texts.csv", "test_data": None, "text_column": "text", "label_column": "label"}
SETTINGS = {"model": "encoder", "data": DATA, "attack_radii": [0.1], "extra": []}


@contextlib.contextmanager
def another_process(folder: Path) -> Iterator[int]:
    """A process that holds a run, until it is killed."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        with run_folder.held(folder):
            os.write(write, b".")
            time.sleep(600)
    try:
        assert os.read(read, 1) == b"."
        yield process
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def run_of(folder: Path, written: float) -> Path:
    """An unfinished run, and when it was written to last."""
    with run_folder.new(folder, RUNS, {"command": "fastadv train", "settings": SETTINGS}):
        (folder / "plain").mkdir()
        (folder / "plain/phase.json").write_text("{}")
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (written, written))
    return folder


def test_runs_of_one_second_have_a_folder_each() -> None:
    with contextlib.ExitStack() as stack:
        folders = [stack.enter_context(run_folder.new(None, RUNS, {"run": number})) for number in range(5)]
        assert len(set(folders)) == 5
        assert [json.loads((one / "settings.json").read_text()) for one in folders] == [{"run": n} for n in range(5)]
        assert all([file.name for file in one.iterdir()] == ["settings.json"] for one in folders)


def test_a_named_folder_is_given_once() -> None:
    """Both runs found it empty."""
    folder = Path("mine")
    run_folder.check(folder)
    folder.mkdir()
    (folder / ".settings.json.1.tmp").touch()  # of a run that was killed before it began
    run_folder.check(folder)
    with run_folder.new(folder, RUNS, {"run": 1}):
        with (
            pytest.raises(UserError, match="mine was taken by another run meanwhile"),
            run_folder.new(folder, RUNS, {}),
        ):
            pass
        assert json.loads((folder / "settings.json").read_text()) == {"run": 1}
    with pytest.raises(UserError, match="holds an unfinished run: --resume"):
        run_folder.check(folder)


def test_a_run_that_another_process_trains_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_of(Path("runs/a"), 1e9)
    with another_process(folder):
        error = refused(capsys, "train", "--resume", "--output-dir", "runs/a")
        assert error == "error: runs/a is being written to by another fastadv: wait until it ends, or stop it"
        assert "runs/a is passed over: another fastadv trains it" in refused(capsys, "train", "--resume")
    read, write = os.pipe()
    with run_folder.held(folder):  # the lock has ended with its process
        worker = os.fork()
        if worker == 0:
            os.write(write, b".")
            time.sleep(600)
        assert os.read(read, 1) == b"."
    try:
        with run_folder.held(folder):  # a worker that outlives its run holds nothing
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_the_run_that_was_written_to_last_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the names are; a checkpoint counts, and a finished run does not."""
    run_of(RUNS / "try-old", 1e9)
    newest = run_of(RUNS / "20260101-000000", 1e9 - 9)
    (run_of(RUNS / "done", 2e9) / "result.json").touch()
    checkpoint = newest / "plain/checkpoint-3"
    checkpoint.mkdir()
    os.utime(newest / "plain", (1e9, 1e9))
    os.utime(checkpoint, (1.5e9, 1.5e9))
    folder, settings, _ = to_resume(RUNS, None)
    assert folder == newest
    assert settings.data.data == "texts.csv"
    assert f"{newest} goes on: of the unfinished runs in runs/ the latest (2017-07-14" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {"later": 1}, "command": ""}', "\udc00"])
def test_a_run_that_cannot_go_on_says_why(capsys: pytest.CaptureFixture[str], content: str) -> None:
    RUNS.joinpath("a").mkdir(parents=True)
    RUNS.joinpath("a/settings.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    error = refused(capsys, "train", "--resume", "--output-dir", "runs/a")
    assert "runs/a cannot be continued: runs/a/settings.json" in error
    assert "Train afresh, with another --output-dir" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to() -> None:
    Path("locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="locked/a cannot be written to"), run_folder.new(Path("locked/a"), RUNS, {}):
        pass


def test_a_file_where_the_folder_should_be() -> None:
    Path("file").touch()
    with pytest.raises(UserError, match="cannot be written to"), run_folder.new(Path("file/a"), RUNS, {}):
        pass


def test_two_commands_in_one_second(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, stopped as soon as it has its folder."""
    from fastadv.train import run

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_phase", stopped)
    for seed in ("1", "2"):
        with pytest.raises(SystemExit) as left:
            main(["train", "--model", str(encoder), "--data", str(table), "--epsilon", "0.1", "--seed", seed])
        assert left.value.code == 130
    seeds = {json.loads(file.read_text())["settings"]["extra"][-1] for file in RUNS.glob("*/settings.json")}
    assert seeds == {"1", "2"}
