"""The tests of a GPU, each in a process of its own and several at a time, and what they counted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

SANITIZER = "compute-sanitizer"
ROOT = Path(__file__).parents[2]
KERNELS = ["tests/kernels/test_values.py"]  # run interpreted as well, and have no mark
CHECKED = ["tests/csrc/test_cuda.py", "-k", "not captured"]  # a capture's pool hides what is beside an allocation
TOOLS = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}


class Count(NamedTuple):
    """What pytest counted, or why it did not."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""

    @property
    def good(self) -> bool:
        return self.passed > 0 and self.failed == 0 and not self.note


def marked() -> list[str]:
    """The files with tests that are marked `gpu`: others may need what this machine has not installed."""
    files = sorted(ROOT.glob("tests/**/test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]


def commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    """What is run, by name: the command and the environment on top."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found = {"marked gpu": ([*pytest, "-m", "gpu", *marked()], {}), "kernels": ([*pytest, *KERNELS], {})}
    sanitizer = [SANITIZER, "--error-exitcode", "9", "--report-api-errors", "no", "--tool"]
    return found | {tool: ([*sanitizer, tool, *pytest, *CHECKED], variables) for tool, variables in TOOLS.items()}


def run_all(limit: float) -> dict[str, Count]:
    """All of them at once, for `limit` seconds: every test waits for the host most of its time."""
    with tempfile.TemporaryDirectory() as folder:
        running = {name: _start(name, *given, Path(folder)) for name, given in commands().items()}
        end = time.monotonic() + limit
        return {name: _finish(name, process, Path(folder), end) for name, process in running.items()}


def _start(name: str, command: list[str], extra: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes] | None:
    if shutil.which(command[0]) is None:
        return None
    log, environment = (folder / f"{name}.txt").open("wb"), {**os.environ, "OMP_NUM_THREADS": "1", **extra}
    report = f"--junitxml={folder / f'{name}.xml'}"
    return subprocess.Popen([*command, report], stdout=log, stderr=log, env=environment)


def _finish(name: str, process: subprocess.Popen[bytes] | None, folder: Path, end: float) -> Count:
    if process is None:
        return Count(note=f"{SANITIZER} is not installed")
    try:
        code = process.wait(max(1.0, end - time.monotonic()))
        note = "" if code == 0 else f"exit status {code}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        note = "out of time"
    count = counted(folder / f"{name}.xml")._replace(note=note)
    if not count.good:
        print((folder / f"{name}.txt").read_text(encoding="utf-8", errors="replace")[-6000:], flush=True)
    return count


def counted(report: Path) -> Count:
    """From pytest's own report; nothing where there is none."""
    if not report.exists():
        return Count()
    kinds, suites = ("tests", "failures", "errors", "skipped"), list(ET.parse(report).getroot().iter("testsuite"))
    tests, failures, errors, skipped = (sum(int(suite.get(kind, 0)) for suite in suites) for kind in kinds)
    return Count(tests - failures - errors - skipped, failures + errors, skipped)
