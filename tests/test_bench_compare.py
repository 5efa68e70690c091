"""Two revisions of fastadv in turns: the figures, the errors, and a run of the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.compare import build, worker
from bench.compare.__main__ import Row, compare, main, mark, ratios, report

ROOT = Path(__file__).parents[1]


def git(*arguments: object, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Git as a user calls it, also where a hook runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", *map(str, arguments)]
    return subprocess.run(command, cwd=at, env=clean, capture_output=True, text=True, check=False)


in_git = pytest.mark.skipif(git("rev-parse", "HEAD").returncode != 0, reason="this tree is not git's")


class Scripted:
    """A worker whose runs take what they are told to take, and whose answer lies in a file already."""

    def __init__(self, *seconds: float, answer: Path | None = None, error: str = "", tolerance: float = 1e-4) -> None:
        self.seconds, self.answer, self.error, self.tolerance = iter(seconds), answer, error, tolerance

    def ask(self, do: str, **_: object) -> dict[str, Any]:
        if do == "prepare":
            return {"error": self.error} if self.error else {"answer": self.answer, "tolerance": self.tolerance}
        return {"seconds": next(self.seconds)}


@pytest.fixture
def answers(tmp_path: Path) -> list[Path]:
    files = [tmp_path / f"{number}.pt" for number in range(2)]
    for number, file in enumerate(files):
        torch.save([torch.tensor([1.0, 1 + number / 10])], file)
    return files


def filled(base: Scripted, head: Scripted, rounds: int = 2) -> Row:
    row = Row("case")
    compare(row, {"base": base, "head": head}, rounds)  # type: ignore[dict-item]
    return row


def test_a_round_is_a_ratio_that_drift_does_not_move() -> None:
    assert ratios([1, 1, 2, 2], [2, 2, 2, 8]) == pytest.approx([2, 2])
    drifting = [1.0, 1.1, 1.21, 1.331]  # base, head, head, base, all as fast
    assert ratios([drifting[0], drifting[3]], drifting[1:3]) == pytest.approx([1])


def test_a_mark_needs_rounds_and_an_interval_without_one() -> None:
    assert mark(1.01, 1.2, 6) == "slower" and mark(0.8, 0.99, 6) == "faster" and mark(0.99, 1.01, 6) == "same"
    assert mark(1.01, 1.2, 5) == "too few rounds"


def test_rounds_fill_both_sides(answers: list[Path]) -> None:
    """The first round warms up."""
    base, head = Scripted(9, 9, 1, 2, 3, 4, answer=answers[0]), Scripted(9, 9, 5, 6, 7, 8, answer=answers[0])
    row = filled(base, head)
    assert (row.base, row.head) == ([1, 2, 3, 4], [5, 6, 7, 8]) and not row.note
    assert row.figures()["mark"] == "too few rounds"


def test_sides_take_turns(answers: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def ask(self: Scripted, do: str, **_: object) -> dict[str, Any]:
        order.append(f"{self.error}{do[0]}")  # `error` is a name here
        return {"answer": answers[0], "tolerance": 0.0, "seconds": 1.0}

    monkeypatch.setattr(Scripted, "ask", ask)
    filled(Scripted(error="b"), Scripted(error="h"))
    warm, first, second = (" ".join(order[at : at + 6]) for at in (0, 6, 12))
    assert first == "bp hp br hr hr br" and second == warm == "hp bp hr br br hr" and len(order) == 18


def test_no_ratio_for_another_answer(answers: list[Path]) -> None:
    row = filled(Scripted(answer=answers[0]), Scripted(answer=answers[1]))
    assert row.note.startswith("differs by 7.1e-02") and "ratio" not in row.figures()
    base, head = (Scripted(*[1.0] * 6, answer=answer, tolerance=0.1) for answer in answers)
    assert "ratio" in filled(base, head).figures()
    torch.save([torch.ones(2), torch.ones(1)], answers[1])
    assert filled(Scripted(answer=answers[0]), Scripted(answer=answers[1])).note.startswith("differs by inf")


def test_what_a_revision_lacks_is_said(answers: list[Path]) -> None:
    row = filled(Scripted(error="AttributeError: no table_step"), Scripted(answer=answers[0]))
    assert row.note == "not there in base: AttributeError: no table_step"
    text = report([row, Row("another"), Row("third", [1.0, 1.0] * 6, [0.5, 0.5] * 6)], {"base": {"name": "v1"}})
    assert "base: v1" in text and row.note in text and "interrupted" in text
    [line] = [line.split() for line in text.splitlines() if line.startswith("third")]
    assert line == ["third", "1", "s", "500", "ms", "0.500", "0.500", "to", "0.500", "faster"]


def test_every_case_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--only", "attack step"]) == 0
    assert capsys.readouterr().out.splitlines() == [name for name in worker.compared() if "attack step" in name]
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "no such case"])


@in_git
def test_a_bad_revision_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for ref in ("no-such-branch", "--all", ""):
        with pytest.raises(build.RevisionError):
            build.resolve(ref)
    assert main(["no-such-branch"]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and "no revision 'no-such-branch'" in err


def test_only_its_own_fastadv_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("fastadv")
    other.__file__ = str(tmp_path / "other/fastadv/__init__.py")
    monkeypatch.setitem(sys.modules, "fastadv", other)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    with pytest.raises(ImportError, match="and not from"):
        worker.import_from(tmp_path / "site")


def test_another_compiler_is_another_build() -> None:
    assert build.settings({"CXX": "g++", "HOME": "/"}) == build.settings({"CXX": "g++", "HOME": "/root"})
    assert build.settings({"CXX": "g++"}) != build.settings({"CXX": "clang++"})


@pytest.mark.slow
@in_git
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_a_clone_against_its_own_head(tmp_path: Path) -> None:
    """With the benchmarks as they are here. Without optimisation the C++ part is built in half the time."""
    clone = tmp_path / "clone"
    done = git("clone", "--quiet", "--no-local", "--depth", "1", ROOT.as_uri(), clone)
    assert done.returncode == 0, done.stderr
    shutil.copytree(ROOT / "bench", clone / "bench", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    arguments = ["HEAD", "--only", "attack step", "--rounds", "3", "--threads", "1", "--json", "all.json"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.compare", *arguments],
        cwd=clone,
        env={**os.environ, "CXXFLAGS": "-O0", "FASTADV_CUDA": "0"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("base: HEAD (") and "head: working tree (" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("attack step")]
    assert [line.partition("  ")[0] for line in lines] == [name for name in worker.compared() if "attack step" in name]
    assert all(line.endswith("too few rounds") and " to " in line for line in lines)
    assert len(list((clone / "build/compare").iterdir())) == 2  # the two builds, and nothing that was on the way
    assert not git("worktree", "list", at=clone).stdout.splitlines()[1:]
