"""`make gpu-check`, as far as it can be tried without a GPU: its figures on the CPU, and what it makes of reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.attack_steps import TABLE
from bench.cases import op_cases
from bench.gpu import stages
from bench.gpu.__main__ import keep
from bench.workloads import MAIN, SIZES
from fastadv import native

ROOT = Path(__file__).parent.parent
REPORT = """<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="10"/></testsuites>"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason="the contestant fastadv needs the C++ ops")
def test_a_rehearsal_fills_in_everything_that_needs_no_gpu(tmp_path: Path) -> None:
    done = run("--rehearse", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "none.json").read_text())
    assert {"gpu", "torch", "triton", "commit", "copy_gbps", "tests", "stages"} <= found.keys()
    assert found["ops"].keys() == op_cases(SIZES["rehearsal"], "cpu").keys()
    assert all({"bytes", "us", "gbps", "of_copy"} == row.keys() for row in found["ops"].values())
    assert found["attack_step"].keys() == {f"attack step, table scope, {model}" for model in MAIN}
    for row in found["attack_step"].values():
        assert row.keys() == TABLE.keys() and min(row.values()) > 0
    names = ("V 500", "V 500, 2 x 8", "V 4,000")
    assert found["training_step"].keys() == {f"training step, PGD-3, {name}" for name in names}
    for row in found["training_step"].values():
        assert row["plain"] < row["fused"] and {"passes alone", "beside_the_passes", "peak_mib"} <= row.keys()
    assert "ascend, token scope, and the words" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
    assert not list(tmp_path.iterdir())


def test_counts_come_from_pytests_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    count = stages.counted(tmp_path / "report.xml")
    assert count == (4, 3, 3, "")
    assert not count.good
    assert not stages.counted(tmp_path / "none.xml").good
    assert stages.Count(passed=1).good
    assert not stages.Count(passed=1, note="out of time").good


@pytest.mark.slow
def test_stages_run_side_by_side_and_what_fails_or_lasts_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_good.py").write_text("def test(): pass")
    (tmp_path / "test_bad.py").write_text("def test(): assert 1 == 2")
    (tmp_path / "test_long.py").write_text("import time\ndef test(): time.sleep(300)")
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null"]
    made = {name: ([*pytest_here, str(tmp_path / f"test_{name}.py")], {}) for name in ("good", "bad", "long")}
    monkeypatch.setattr(stages, "commands", lambda: {**made, "absent": (["no-such-sanitizer"], {})})
    found = stages.run_all(limit=30)
    assert found["good"] == (1, 0, 0, "")
    assert found["bad"] == (0, 1, 0, "exit status 1")
    assert found["long"].note == "out of time"
    assert "not installed" in found["absent"].note
    assert "assert 1 == 2" in capsys.readouterr().out


def test_results_are_named_after_the_gpu(tmp_path: Path) -> None:
    path = keep({"gpu": "NVIDIA H100 80GB HBM3"}, tmp_path)
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    path.write_text('{"gpu": "old", "groups": {"attack step": {}}}')
    keep({"gpu": "NVIDIA H100 80GB HBM3", "copy_gbps": 1}, tmp_path)
    assert json.loads(path.read_text()) == {
        "gpu": "NVIDIA H100 80GB HBM3",
        "copy_gbps": 1,
        "groups": {"attack step": {}},
    }


def test_every_case_runs_in_bfloat16_and_moves_something() -> None:
    for case in op_cases(SIZES["rehearsal"], "cpu").values():
        field = case.make()
        entry = field.entries["fused"]
        entry.setup()
        entry.run()
        assert (field.moved or 0) > 0


def test_the_gpus_tests_are_found_by_their_mark() -> None:
    """Wherever they lie, and no file that needs more than such a machine has installed."""
    found = stages.marked()
    assert "tests/csrc/test_cuda.py" in found and len(found) > 1
    assert all(f"pytest.mark.{'gpu'}" in (ROOT / name).read_text() for name in found)
    commands = {name: command for name, (command, _) in stages.commands().items()}
    assert commands["marked gpu"][-len(found) :] == found and {"memcheck", "racecheck", "kernels"} < commands.keys()
    given = [ROOT / part for command in commands.values() for part in command if part.endswith(".py")]
    assert all(file.is_file() for file in given)
