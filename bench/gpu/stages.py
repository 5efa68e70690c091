"""The tests of a GPU: which there are, all of them side by side, and what became of each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.workers import REPORT, ROOT, Worker

KERNELS = ["tests/kernels/test_values.py", "tests/kernels/test_edges.py"]  # run interpreted as well, and have no mark
CHECKED = ["tests/csrc/test_cuda.py", "-k", "not captured"]  # a capture's pool hides what is beside an allocation
CHECKED_KERNELS = [*KERNELS, "-k", "not float64 and not float16 or bfloat16"]  # the dtypes differ in loads and stores
QUICK = ["tests/contracts/test_gpu_features.py", "-m", "not gpu and not slow", "-k", "not compiled"]
SANITIZER = "compute-sanitizer"
FOUND = 9  # the exit status of a sanitizer that has found something
TOOLS = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}
SANITIZING = ["--error-exitcode", str(FOUND), "--report-api-errors", "no", "--destroy-on-device-error", "kernel"]
OURS = ["--kernel-name-exclude", "regex=at6native|at4cuda|at_cuda_detail|3cub|cutlass|cublas|gemm|nvjet"]  # not torch's
REPORTED = re.compile(r"^=+ ((?:Invalid|Misaligned|Error: Race|Warning: Race).*)", re.MULTILINE)


class Stage(NamedTuple):
    """Tests that belong together, and how many processes share them."""

    arguments: Sequence[str]
    parts: int = 1
    tool: str | None = None  # of the sanitizer
    limit: float = 60.0  # seconds a test


def stages() -> dict[str, Stage]:
    found = {"marked gpu": Stage(["-m", "gpu", *marked()], 4), "kernels": Stage(KERNELS, 2)}
    for tool in TOOLS:
        found[f"{tool}, CUDA"] = Stage(CHECKED, 1, tool, 120)
        found[f"{tool}, Triton"] = Stage(CHECKED_KERNELS, 1, tool, 120)
    return found


def rehearsal() -> dict[str, Stage]:
    """A few real tests, on the CPU."""
    return {"quick": Stage(QUICK, 2)}


def marked() -> list[str]:
    """The files with tests that are marked `gpu`: others may need what this machine has not installed."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def sanitizer() -> str | None:
    """On PATH, or where the toolkit keeps it."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in (*homes, "/usr/local/cuda"))])
    return shutil.which(SANITIZER, path=places)


def prefix(program: str, tool: str) -> list[str]:
    """The sanitizer around a command, for our kernels alone if it can tell: torch's are many, and not our concern."""
    plain = [program, "--tool", tool, *SANITIZING]
    try:
        subprocess.run([*plain, *OURS, "--version"], capture_output=True, check=True, timeout=20)
    except subprocess.SubprocessError:
        return plain
    return [*plain, *OURS]


class Running:
    """A stage at work: one process for each part."""

    def __init__(self, name: str, stage: Stage, folder: Path, variables: Mapping[str, str], only: Path | None) -> None:
        self.name, self.stage, self.began, self.workers = name, stage, time.monotonic(), list[Worker]()
        self.note, self.seconds, before = "", 0.0, list[str]()
        environment = {"OMP_NUM_THREADS": "1", **variables, **(TOOLS[stage.tool] if stage.tool else {})}
        if stage.tool:
            program = sanitizer()
            if program is None:
                self.note = f"{SANITIZER} is not installed"
                return
            before = prefix(program, stage.tool)
        pytest = [
            *before,
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            f"--junitxml={REPORT}",
        ]
        pytest += ["-p", "bench.gpu.watch", "--continue-on-collection-errors", "--limit", str(stage.limit)]
        pytest += [*stage.arguments, *([f"--only={only}"] if only else [])]
        for part in range(stage.parts):
            one = f"{name} {part + 1}/{stage.parts}" if stage.parts > 1 else name
            self.workers.append(Worker(one, [*pytest, "--part", f"{part}/{stage.parts}"], folder, environment))

    def poll(self) -> bool:
        running = [worker for worker in self.workers if worker.poll()]
        self.seconds = round(time.monotonic() - self.began, 1) if running else self.seconds
        return bool(running)

    def found(self) -> dict[str, Any]:
        """Counts, and every failure."""
        ended: dict[str, dict[str, Any]] = {}
        left, notes = 0, [self.note, *(worker.note for worker in self.workers)]
        for worker in self.workers:
            seen = worker.journal.read()
            ended |= seen.ended
            left += len(seen.left)
            if self.stage.tool:
                reports = REPORTED.findall(worker.log.read_text(encoding="utf-8", errors="replace"))
                notes += [f"{len(reports)} reports of the sanitizer, first: {reports[0]}"] if reports else []
                notes += ["the sanitizer found errors"] if worker.status == FOUND and not reports else []
        outcomes = [one["outcome"] for one in ended.values()]
        counts = {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")}
        failures = {name: one["message"] for name, one in ended.items() if one["outcome"] == "failed"}
        starts = sum(worker.starts for worker in self.workers)
        found = {**counts, "not_run": left, "seconds": self.seconds, "starts": starts}
        return {**found, "note": "; ".join(dict.fromkeys(filter(None, notes))), "failures": failures}


def good(found: Mapping[str, Any]) -> bool:
    return found["passed"] > 0 and not (found["failed"] or found["not_run"] or found["note"])


def run_all(
    chosen: Mapping[str, Stage], folder: Path, end: float, keep: Callable[[dict[str, dict[str, Any]]], None]
) -> dict[str, dict[str, Any]]:
    """All of them at once until `end`, by the monotonic clock: every test waits for the host most of its time.

    What fails without a sanitizer is run again, one kernel at a time. `keep` is told whenever a count has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    running = [Running(name, stage, folder, {}, None) for name, stage in chosen.items()]
    told: dict[str, dict[str, Any]] = {}
    again = {one.name: one for one in running if not one.stage.tool}
    try:
        while True:
            busy = [one for one in running if one.poll()]
            found = {one.name: one.found() for one in running}
            if found != told:
                keep(told := found)
            for name in [name for name in again if again[name] not in busy]:
                running += _again(again.pop(name), found[name]["failures"], folder)
                busy = running
            if not busy or time.monotonic() >= end:
                break
            time.sleep(0.5)
    finally:
        workers = [worker for one in running for worker in one.workers]
        for end_it in (Worker.kill, Worker.stop):  # all of them, before one is waited for
            for worker in workers:
                end_it(worker)
    keep(found := {one.name: one.found() for one in running})
    return found


def _again(first: Running, failures: Mapping[str, str], folder: Path) -> list[Running]:
    if not failures:
        return []
    only = folder / f"{first.name.replace(' ', '_')}_failed.lst"
    only.write_text("\n".join(failures), encoding="utf-8")
    stage = first.stage._replace(parts=min(first.stage.parts, len(failures)))
    return [Running(f"{first.name}, again", stage, folder, {"CUDA_LAUNCH_BLOCKING": "1"}, only)]
