"""Rows for `python -m bench.gpu figures --rehearse --rows tests.planted:rows`: good ones, and all that can go wrong."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from bench.gpu.row import Row


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
    bad = {"fails": Row(fail), "hangs": Row(hang, 2.0), "crashes": Row(crash), "leaves": Row(leave)}
    found = {f"planted: {name}": row for name, row in bad.items()}
    good = {f"planted: good {index}": Row(lambda: {"us": 1.0}) for index in range(len(bad) + 1)}
    return dict(
        one for pair in zip(good.items(), [*found.items(), *list(good.items())[-1:]], strict=True) for one in pair
    )


def naps(device: str) -> Mapping[str, Row]:
    return {f"planted: nap {index}": Row(nap) for index in range(60)}
