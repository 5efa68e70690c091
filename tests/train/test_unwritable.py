"""An output that cannot be written is refused before the data are read: here the data are missing too."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastadv.jobs.errors import UserError
from fastadv.jobs.writable import check_file, check_files
from tests.train.command import refused

NO_DATA = ["--data", "nowhere.csv"]
COMMANDS = {
    "compare": [*NO_DATA, "--methods", "fgm", "--output-dir"],
    "sweep": [*NO_DATA, "--try", "fgm", "--output-dir"],
    "evaluate": ["model", *NO_DATA, "--output-dir"],
    "predict": ["model", *NO_DATA, "--output"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_where_a_folder_should_be(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    Path("taken").touch()
    message = refused(capsys, command, *COMMANDS[command], "taken/out")
    assert "cannot be writ" in message
    assert "Not a directory" in message
    assert COMMANDS[command][-1] in message


@pytest.mark.parametrize(("command", "name"), [("compare", "compare.svg"), ("evaluate", "evaluation.svg")])
def test_a_folder_where_a_file_should_be(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    Path("out", name).mkdir(parents=True)
    assert f"out/{name} is in the way" in refused(capsys, command, *COMMANDS[command], "out")


def test_a_folder_is_no_output_of_predict(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model").mkdir()
    assert "Is a directory" in refused(capsys, "predict", *COMMANDS["predict"], "model")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=40k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("this user cannot mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk(small: Path) -> None:
    with pytest.raises(UserError, match="No space left on device"):
        check_files(small / "new" / "out", ["compare.json"])
    assert not list(small.iterdir())


def test_a_read_only_disk(small: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro,size=1m", small], check=True)
    with pytest.raises(UserError, match="Read-only file system"):
        check_files(small / "new", ["compare.json"])
    with pytest.raises(UserError, match="Read-only file system"):
        check_file(small / "new.jsonl", "--output")


def test_without_permission() -> None:
    if os.getuid() != 0:
        pytest.skip("only root can become somebody else")
    Path("mine").mkdir(mode=0o755)
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        try:
            check_files(Path("mine/out"), ["compare.json"])
        except UserError as error:
            os._exit(0 if "Permission denied" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_can_be_written_is_not_touched() -> None:
    Path("out").mkdir()
    Path("out/compare.json").write_text("{}")
    check_files(Path("out"), ["compare.json"])
    check_files(Path("new/deep"), ["compare.json"])
    check_file(Path("answers.jsonl"), "--output")
    check_file(Path("/dev/null"), "--output")
    assert [str(path) for path in sorted(Path().rglob("*"))] == ["out", "out/compare.json"]
    assert Path("out/compare.json").read_text() == "{}"
