"""The tests of a GPU, each in a process of its own and several at a time, and what they counted."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import torch

import fastadv
from tests.every import EVERY
from tests.models import TinyModel
from tests.support import batch, seeded

SANITIZER = "compute-sanitizer"
TESTS = {
    "methods, capture, syncs": ["-m", "gpu", "tests/methods", "tests/contracts"],
    "kernels": ["tests/kernels/test_values.py"],
    "csrc": ["tests/csrc/test_cuda.py"],
}
CHECKED = [
    "tests/csrc/test_cuda.py",
    "-k",
    "not captured",
]  # a capture allocates from a pool, which hides what is beside
TOOLS = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "racecheck": {}}


class Count(NamedTuple):
    """What pytest counted, or why it did not."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    note: str = ""

    @property
    def good(self) -> bool:
        """Whether anything ran, and nothing failed."""
        return self.passed > 0 and self.failed == 0 and not self.note


def commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    """What is run, by name: the command and the environment on top."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    found: dict[str, tuple[list[str], dict[str, str]]] = {name: ([*pytest, *rest], {}) for name, rest in TESTS.items()}
    sanitizer = [SANITIZER, "--error-exitcode", "9", "--report-api-errors", "no", "--tool"]
    for tool, environment in TOOLS.items():
        found[tool] = ([*sanitizer, tool, *pytest, *CHECKED], environment)
    return found


def run_all(limit: float) -> dict[str, Count]:
    """All of them at once, for `limit` seconds: every test waits for the host most of its time."""
    with tempfile.TemporaryDirectory() as folder:
        running = {name: _start(name, *given, Path(folder)) for name, given in commands().items()}
        end = time.monotonic() + limit
        return {name: _finish(name, process, Path(folder), end) for name, process in running.items()}


def _start(name: str, command: list[str], extra: Mapping[str, str], folder: Path) -> subprocess.Popen[bytes] | None:
    if shutil.which(command[0]) is None:
        return None
    report = folder / f"{name}.xml"
    log = (folder / f"{name}.txt").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **extra}
    return subprocess.Popen([*command, f"--junitxml={report}"], stdout=log, stderr=log, env=environment)


def _finish(name: str, process: subprocess.Popen[bytes] | None, folder: Path, end: float) -> Count:
    if process is None:
        return Count(note=f"{SANITIZER} is not installed")
    note = ""
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
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    tests, bad, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return Count(tests - bad - skipped, bad, skipped)


def syncs() -> int | None:
    """How often a step of any method waits for the device, after its first; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    found = 0
    for make in EVERY.values():
        model = seeded(lambda: TinyModel("tfm"), dtype=torch.float32).cuda()
        data = {name: tensor.cuda() for name, tensor in batch().items()}
        adv = make(model, embedding=model.word_embeddings, scope="sample")
        adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])  # noqa: B023
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adv.backward(lambda: model(**data).loss, mask=data["attention_mask"])  # noqa: B023
        torch.cuda.set_sync_debug_mode("default")
        found += sum("synchronizing" in str(warning.message) for warning in caught)
        adv.close()
    return found


def versions() -> dict[str, str | None]:
    """What stands beside every figure."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "torch": torch.__version__, "triton": triton_version, "fastadv": fastadv.__version__}
