"""A disk that is soon full: a small tmpfs, where this machine lets one mount."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount `size` bytes at a folder; the test skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"a full disk needs a tmpfs, and mount cannot run: {error}")
    if mounted.returncode:
        pytest.skip(f"a full disk needs a tmpfs: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def enlarge(folder: Path, size: int) -> None:
    """Make room, as a user does."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
