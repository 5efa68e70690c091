"""Builds the extension for this GPU, with what there is: pip without a network, or else setup.py alone."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.gpu.workers import ROOT

OLDEST = 77  # setuptools: what reads the licence in pyproject.toml
PIP = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
WORK = Path("build/gpu-check")
STAMP = WORK / "built"


def needed(here: Mapping[str, Any], root: Path = ROOT) -> str | None:
    """What to build for: the sources' fingerprint and the architecture, unless that is what is there."""
    wanted = f"{here['architecture']} {here['python']} {fingerprint(root)}"
    stamp = root / STAMP
    there = here["no_cuda"] is None and stamp.exists() and stamp.read_text(encoding="utf-8") == wanted
    return None if there else wanted


def fingerprint(root: Path = ROOT) -> str:
    """Of all that the extension is built from."""
    files = [*sorted((root / "csrc").iterdir()), root / "setup.py", root / "fastadv/native/toolchain.py"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def build(wanted: str, log: Path, limit: float, root: Path = ROOT, **variables: str) -> str | None:
    """Pip first; then setup.py, which an older setuptools runs as well. Why neither did it, or None."""
    arch = wanted.split(maxsplit=1)[0]
    environment = {**os.environ, "FASTADV_CUDA": "1", "FASTADV_CUDA_ARCHS": arch, **variables}
    environment["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    end = time.monotonic() + limit
    (root / WORK).mkdir(parents=True, exist_ok=True)
    alone = [str(root / "setup.py"), "build_ext", "--build-lib", str(root)]
    for command, place in ((PIP, root), (alone, root / WORK)):  # there is no pyproject.toml there to read
        if _run([sys.executable, *command], log, end - time.monotonic(), place, environment) == 0:
            (root / STAMP).write_text(wanted, encoding="utf-8")
            return None
    return f"neither pip nor setup.py could build the extension: see {log}"


def advice(here: Mapping[str, Any]) -> str | None:
    """What a build may lack, and what to do about it."""
    found = here.get("setuptools")
    if found is None:
        return f"setuptools is not installed: bring a wheel of version {OLDEST} or later (pip install --no-index FILE)"
    if int(found.split(".")[0]) < OLDEST:
        return (
            f"setuptools is {found}, and pyproject.toml's licence needs {OLDEST} or later: "
            f"bring a wheel of it (pip install --no-index FILE)"
        )
    return None


def _run(command: list[str], log: Path, limit: float, place: Path, environment: Mapping[str, str]) -> int:
    with log.open("ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, cwd=place, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip
    try:
        return process.wait(max(limit, 1.0))
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        return process.wait(10)
