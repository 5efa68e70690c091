"""What this machine has, asked in a process of its own: `python -m bench.gpu.here` prints it as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from typing import Any

from bench.gpu.workers import ROOT

LIMIT = 120.0  # seconds: the first import of torch on a fresh machine takes long


def ask() -> dict[str, Any]:
    """The answer of a process that starts CUDA, so that this one needs not."""
    command = [sys.executable, "-m", "bench.gpu.here"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return {"gpu": None, "problem": f"torch did not start within {LIMIT:.0f} s"}
    if done.returncode:
        return {"gpu": None, "problem": done.stderr[-2_000:]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def commit() -> str | None:
    if shutil.which("git") is None:
        return None
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() or None


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    import torch

    from fastadv import native
    from fastadv.ops import dispatch

    there = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if there else None
    found = {"gpu": gpu, "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    found |= {name: version(name) for name in ("triton", "transformers", "pytest", "setuptools")}
    if there:
        found["architecture"] = "{}{}".format(*torch.cuda.get_device_capability())
    missing = {row.op: row.reason for row in dispatch.report() if row.device == "cuda" and not row.available}
    print(json.dumps({**found, "no_cuda": native.cuda_reason(), "missing": missing}))


if __name__ == "__main__":
    main()
