"""`python -m bench.gpu`, as far as it can be tried without a GPU: on the CPU, with planted faults of every kind."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

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
from tests.planted import found, run

ROOT = Path(__file__).parent.parent
slow = pytest.mark.slow


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
    assert {"sums_kernel", "segments_kernel", "grads_kernel", "copy_kernel"} <= ours
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
