"""`python -m bench.gpu`, as far as it can be tried without a GPU: on the CPU, with planted faults of every kind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import contest, training
from bench.attack_steps import TABLE
from bench.cases import op_cases
from bench.contest import Case, Field
from bench.gpu import here, install, results, rows, stages
from bench.gpu.journal import Journal
from bench.race import Entry, nothing
from bench.workloads import MAIN, SIZES, classifier, inputs, loss_closure
from fastadv import native
from fastadv.ops.dispatch import OPS

ROOT = Path(__file__).parent.parent
slow = pytest.mark.slow
TESTS = {
    "good": "import pytest\n@pytest.mark.parametrize('n', range(6))\ndef test(n): pass",
    "bad": "def test_before(): pass\ndef test(): assert 1 == 2\ndef test_after(): pass",
    "long": "import ctypes\ndef test(): ctypes.PyDLL(None).sleep(3600)\ndef test_after(): pass",
    "dead": "import os, signal\ndef test(): os.kill(os.getpid(), signal.SIGSEGV)\ndef test_after(): pass",
    "gone": "import no_such_module",
    "broken": (
        "from bench.gpu import watch\n"
        "def test():\n    watch.broken = lambda: True\n    assert 3 == 4\n"
        "def test_after(): assert not watch.broken()"  # in a new process
    ),
    "skipped": "import pytest\ndef test(): pytest.skip('planted')",
    "once": "import os\ndef test(): assert os.environ.get('CUDA_LAUNCH_BLOCKING')",  # good when it is run again
}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "bench.gpu", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def found(folder: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((folder / "rehearsal.json").read_text())
    return kept


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


@slow
@pytest.mark.skipif(not native.available(), reason="the contestant fastadv needs the C++ ops")
def test_a_rehearsal_of_the_figures_fills_in_every_row(tmp_path: Path) -> None:
    results.keep(tmp_path / "rehearsal.json", tests={"passed": 3})
    done = run("figures", "--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = found(tmp_path)
    assert kept["tests"] == {"passed": 3}
    figures = kept["figures"]
    assert {"torch", "triton", "commit", "copy"} <= figures.keys() and figures["copy"]["bandwidth"]["gbps"] > 0
    assert figures["ops"].keys() == figures["checked"].keys() == op_cases(SIZES["rehearsal"], "cpu").keys()
    for row in figures["ops"].values():
        assert {"bytes", "us", "interval_us", "gbps", "of_copy"} == row.keys()
        assert row["us"].keys() == row["interval_us"].keys() == {"fused", rows.AGAIN}
        assert all(low <= row["us"][name] <= high for name, (low, high) in row["interval_us"].items())
    assert all(row["elements"] > 0 and row["worst"] <= 1 for row in figures["checked"].values())
    assert figures["attack_step"].keys() == {f"attack step, table scope, {model}" for model in MAIN}
    assert all(row["us"].keys() == {*TABLE, rows.AGAIN} for row in figures["attack_step"].values())
    names = ("V 500", "V 500, 2 x 8", "V 4,000")
    assert figures["training_step"].keys() == {f"training step, PGD-3, {name}" for name in names}
    for row in figures["training_step"].values():
        assert {"passes alone", "plain", "fused", rows.AGAIN} < row["us"].keys()
        assert {"interval_us", "beside_the_passes", "peak_mib"} < row.keys()


@slow
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


@slow
def test_what_there_is_no_time_for_is_said_and_the_command_ends(tmp_path: Path) -> None:
    start = time.monotonic()
    done = run("figures", "--rehearse", "--rows", "tests.planted:naps", "--budget", 40, "--out", tmp_path)
    assert time.monotonic() - start < 75 and done.returncode == 1
    row = found(tmp_path)["figures"]["planted"]
    assert row["nap 0"] == {"us": 1e6} and row["nap 59"] == {"failed": "out of time"} and len(row) == 60


@slow
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


@slow
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


@slow
def test_a_rehearsal_of_the_tests_is_good(tmp_path: Path) -> None:
    done = run("tests", "--rehearse", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found(tmp_path)["tests"]["stages"].keys() == {"quick"} and found(tmp_path)["tests"]["passed"] > 15


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run("tests", "--out", tmp_path)
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
    assert not list(tmp_path.glob("*.json"))


def test_a_journal_outlives_a_line_that_was_never_finished(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.plan(["a", "b", "c"])
    journal.begin("a", 60)
    journal.end("a", us=1)
    journal.begin("b", 60)
    journal.end("none of the plan", failed="at once")
    with journal.path.open("a") as file:
        file.write('{"end": "b", "fou')
    seen = journal.read()
    assert list(seen.running) == ["b"] and seen.left == ["c"] and seen.ended["a"] == {"us": 1}


def test_results_are_named_after_the_gpu_and_stand_beside_the_reports(tmp_path: Path) -> None:
    path = results.place(tmp_path / "new", "NVIDIA H100 80GB HBM3")
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    results.keep(path, gpu="NVIDIA H100 80GB HBM3", groups={"attack step": {}}, tests=1)
    results.keep(path, figures=2, tests=3)
    assert json.loads(path.read_text()) == {
        "gpu": "NVIDIA H100 80GB HBM3", "groups": {"attack step": {}}, "tests": 3, "figures": 2,
    }  # fmt: skip
    assert list(path.parent.iterdir()) == [path]


def case_of(run: Callable[[], Tensor], right: Tensor) -> Case:
    entries = {"reference": Entry(nothing, lambda: right), "fused": Entry(nothing, run)}
    return Case(lambda: Field(entries), ())


def test_what_an_op_does_not_write_shows() -> None:
    right = torch.randn(1000, 8, dtype=torch.bfloat16)

    def written(rows: int) -> Tensor:
        out = torch.empty_like(right)
        out[:rows] = right[:rows]
        return out

    assert rows.checked("grads", case_of(lambda: written(1000), right))["worst"] == 0
    with pytest.raises(AssertionError, match="inf times as far"):
        rows.checked("grads", case_of(lambda: written(999), right))
    wrong = right.clone()
    wrong[500, 3] += 0.1
    with pytest.raises(AssertionError, match="times as far"):
        rows.checked("grads", case_of(lambda: wrong, right))


def test_a_gradient_that_is_rounding_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention key's bias has no gradient: what bfloat16 leaves there differs by more than half of itself.

    Scaled up, so that it is larger than what `difference` leaves out, as it is on a larger model.
    """
    work, network, names = (8, 32, 500), (128, 2, 4, 128), ("reference", "torch")
    kept = training.pgd(names, work, network, "cpu", 3, torch.bfloat16, 1e-4)
    model, batch = classifier(network, work[-1]), inputs(*work)
    assert "attention_mask" not in batch  # transformers would read it on the host in every forward
    loss = loss_closure(model, batch, torch.bfloat16)
    steps = {name: training.step(name, "PGD-3", model, lambda *_: 4096 * loss()) for name in names}
    field = training.field(model, steps, work, kept.tolerance)
    with pytest.raises(AssertionError, match="is not the first contestant's"):
        contest.check(field)
    contest.check(field._replace(floor=kept.floor))


def test_every_case_runs_in_bfloat16_and_moves_something() -> None:
    for case in op_cases(SIZES["rehearsal"], "cpu").values():
        field = case.make()
        entry = field.entries["fused"]
        entry.setup()
        entry.run()
        assert (field.moved or 0) > 0


def test_the_gpus_tests_are_found_by_their_mark() -> None:
    """Wherever they lie, and no file that needs more than such a machine has installed."""
    marked = stages.marked()
    assert "tests/csrc/test_cuda.py" in marked and len(marked) > 1
    assert all(f"pytest.mark.{'gpu'}" in (ROOT / name).read_text() for name in marked)
    every = [one for stage in stages.stages().values() for one in stage.arguments] + stages.QUICK
    assert all((ROOT / one).is_file() for one in every if one.endswith(".py"))
    assert len(stages.stages()) == 6


def test_the_sanitizers_filter_leaves_our_kernels_in_and_torchs_out() -> None:
    left_out = re.compile(stages.OURS[1].removeprefix("regex="))
    sources = [file.read_text() for folder in ("kernels/*.py", "csrc/*.cu") for file in ROOT.glob(folder)]
    ours = {name for text in sources for name in re.findall(r"(\w+_kernel)\b", text)}
    assert {"sums_kernel", "segment_sum_kernel", "grads_kernel", "copy_kernel"} <= ours
    assert not [name for name in ours if left_out.search(f"_ZN7fastadv12_GLOBAL__N_1{name}")]
    assert left_out.search("_ZN2at6native29vectorized_elementwise_kernelILi4E")


def test_a_sanitizer_that_knows_no_filter_runs_without(tmp_path: Path) -> None:
    """With its options checked by itself; this one knows `--tool` and nothing else of the name."""
    program = tmp_path / "compute-sanitizer"
    for knows in (True, False):
        program.write_text(f'#!/bin/sh\ncase "$*" in *--kernel-name*) exit {0 if knows else 255};; esac\n')
        program.chmod(0o755)
        assert (stages.OURS[0] in stages.prefix(str(program), "memcheck")) == knows


def test_what_a_sanitizer_reports_is_found_in_its_log() -> None:
    log = (
        "========= Invalid __global__ write of size 4 bytes\n=========     at f+0x1\n========= ERROR SUMMARY: 1 error\n"
    )
    log += "========= Error: Race reported between Write access at f+0x2 and Read access at f+0x3 [2 hazards]\n"
    assert [one.split()[0] for one in stages.REPORTED.findall(log)] == ["Invalid", "Error:"]


@slow
def test_the_extension_is_built_without_pip(tmp_path: Path) -> None:
    """Where pip fails, setup.py builds in place; and what is there already is not built again."""
    tree, poison = tmp_path / "tree", tmp_path / "poison"
    tree.mkdir()
    poison.mkdir()
    for name in ("fastadv", "kernels", "csrc"):
        ignored = ["-not", "-name", "*.so", "-not", "-name", "_build_info.json", "-not", "-name", "*.pyc"]
        files = subprocess.run(
            ["find", name, "-type", "f", *ignored], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for file in files.stdout.split():
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).write_bytes((ROOT / file).read_bytes())
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (tree / name).write_bytes((ROOT / name).read_bytes())
    (poison / "pip.py").write_text("raise SystemExit('no pip here')")
    machine = {"architecture": "90", "python": "3", "no_cuda": None}
    wanted = install.needed(machine, tree)
    assert wanted is not None
    log = tmp_path / "build.txt"
    variables = {"FASTADV_CUDA": "0", "FASTADV_NATIVE": "1", "CXXFLAGS": "-O0", "PYTHONPATH": str(poison)}
    assert install.build(wanted, log, 600, tree, **variables) is None, log.read_text()
    assert "no pip here" in log.read_text() and list((tree / "fastadv").glob("_C*"))
    assert install.needed(machine, tree) is None
    assert install.needed({**machine, "no_cuda": "compiled without CUDA"}, tree)
    (tree / "csrc/rows.h").write_text("// changed")
    assert install.needed(machine, tree)


def test_what_a_machine_lacks_is_asked_in_a_process_of_its_own() -> None:
    found = here.ask()
    assert found["torch"] == torch.__version__ and found["missing"].keys() <= {op.name for op in OPS}
    if not torch.cuda.is_available():
        assert found["gpu"] is None and found["no_cuda"] == native.cuda_reason() and "ascend" in found["missing"]


def test_an_old_setuptools_is_told() -> None:
    assert install.advice({"setuptools": "77.0.1"}) is None
    assert "77 or later" in str(install.advice({"setuptools": "68.1"}))
    assert "not installed" in str(install.advice({}))
