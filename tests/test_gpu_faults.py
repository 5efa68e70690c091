"""`python -m bench.gpu` meets rows and tests that fail, hang or crash, is out of time, and is killed."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.gpu import results
from tests.planted import ROOT, TESTS, command, found, run

pytestmark = pytest.mark.slow


def until(true: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := true()) and time.monotonic() < end:
        time.sleep(0.1)
    return done


def processes(word: str) -> Iterator[int]:
    """Those whose command has that word."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in file.read_text():
                yield int(file.parent.name)
        except OSError:
            continue


def test_a_row_that_fails_hangs_or_crashes_loses_only_itself(tmp_path: Path) -> None:
    done = run("figures", "--rehearse", "--rows", "tests.planted:rows", "--out", tmp_path)
    assert done.returncode == 1 and "NOT GOOD" in done.stdout
    row = found(tmp_path)["figures"]["planted"]
    assert [name for name in row if name.startswith("good") and row[name] == {"us": 1.0}] == [
        f"good {index}" for index in range(5)
    ]
    assert row["fails"] == {"failed": "ValueError: planted"}
    assert row["hangs"] == {"failed": "hung for 2 s"}
    assert row["crashes"] == {"failed": "its process died: SIGSEGV"}
    assert row["leaves"] == {"failed": "its process died: exit status 0"}
    assert len(row) == 9 and done.stdout.index("good 4") < done.stdout.index("hung for 2 s")
    assert "planted.py" in (tmp_path / "logs/figures.txt").read_text()  # where it hung


def test_what_there_is_no_time_for_is_said_and_the_command_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run("figures", "--rehearse", "--rows", "tests.planted:naps", "--budget", 40, "--out", tmp_path)
    assert time.monotonic() - start < 75 and done.returncode == 1
    row = found(tmp_path)["figures"]["planted"]
    assert row["nap 0"] == {"us": 1e6} and row["nap 59"] == {"failed": "out of time"} and len(row) == 60


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_a_command_that_is_killed_leaves_its_results_and_no_process(tmp_path: Path) -> None:
    arguments = ("figures", "--rehearse", "--rows", "tests.planted:naps", "--out", tmp_path)
    process = subprocess.Popen(command(*arguments), cwd=ROOT)
    try:
        assert until(lambda: "figures" in (found(tmp_path) if list(tmp_path.glob("*.json")) else {}), 120)
    finally:
        process.kill()
        process.wait()
    assert found(tmp_path)["figures"]["planted"]["nap 0"] == {"us": 1e6}
    journal = str(tmp_path / "logs/figures.jsonl")
    assert until(lambda: not list(processes(journal)), 10)


def test_a_test_that_fails_hangs_or_crashes_loses_only_itself(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    for name, text in TESTS.items():
        (tmp_path / f"planted/test_{name}.py").write_text(text)
    results.keep(tmp_path / "out/rehearsal.json", figures={"copy": 1})
    files = sorted(tmp_path.glob("planted/test_*.py"))
    done = run("tests", "--rehearse", "--limit", 3, "--out", tmp_path / "out", *files)
    assert done.returncode == 1 and done.stderr == ""
    kept = found(tmp_path / "out")
    assert kept["figures"] == {"copy": 1}
    once, again = kept["tests"]["stages"].values()
    assert (once["passed"], once["failed"], once["skipped"], once["not_run"]) == (11, 6, 1, 0)
    said = {Path(name.split("::")[0]).stem: message for name, message in once["failures"].items()}
    assert "assert 1 == 2" in said["test_bad"] and "No module named" in said["test_gone"]
    assert said["test_long"].startswith("hung for 3 s") and said["test_dead"].startswith("its process died: SIGSEGV")
    assert (again["passed"], again["failed"]) == (1, 5)  # with CUDA_LAUNCH_BLOCKING
    assert "AssertionError" in done.stdout.partition("failed, told in full")[2]
    assert "Timeout (0:00:03)!" in "".join(file.read_text() for file in (tmp_path / "out/logs").glob("given*.txt"))
