"""All that can go wrong in bench.gpu: in rows (`figures --rehearse --rows tests.planted:rows`) and tests."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.row import Row

ROOT = Path(__file__).parent.parent


def hang() -> dict[str, Any]:
    """With the interpreter's lock, so that no Python runs in this process any more."""
    ctypes.PyDLL(None).sleep(3600)
    return {}


def crash() -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def fail() -> dict[str, Any]:
    raise ValueError("planted")


def leave() -> dict[str, Any]:
    sys.exit(0)


def nap() -> dict[str, Any]:
    time.sleep(1)
    return {"us": 1e6}


def rows(device: str) -> Mapping[str, Row]:
    good = Row(lambda: {"us": 1.0})
    return {
        "planted: good 0": good,
        "planted: fails": Row(fail),
        "planted: good 1": good,
        "planted: hangs": Row(hang, 2.0),
        "planted: good 2": good,
        "planted: crashes": Row(crash),
        "planted: good 3": good,
        "planted: leaves": Row(leave),
        "planted: good 4": good,
    }


def naps(device: str) -> Mapping[str, Row]:
    return {f"planted: nap {index}": Row(nap) for index in range(60)}


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
