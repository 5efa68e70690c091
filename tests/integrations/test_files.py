"""A file is whole whenever its writer is killed, and the next writer removes what was left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastadv.integrations import files


def test_a_writer_that_is_killed_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    files.write(path, "old")
    process = os.fork()
    if process == 0:
        try:
            files.os.fsync = lambda _: os.kill(os.getpid(), 9)
            files.write(path, "new")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -9
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    (left,) = {one for one in tmp_path.iterdir() if one != path}
    mine = tmp_path / left.name.replace(str(process), str(os.getppid()))
    mine.write_text("of a process that is there")
    files.write(path, "newer")
    assert path.read_text() == "newer"
    assert set(tmp_path.iterdir()) == {path, mine}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    files.write(tmp_path / "a", "old")
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(tmp_path / "a", "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("a", "old")]
