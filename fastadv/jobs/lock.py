"""Let one process at a time into something: a lock that dies with its process, SIGKILL included."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold `path`, a file made for this and removed afterwards; give False where another holds it and `wait` is False.

    What a killed process leaves is a file that nobody holds: the next one takes it.
    """
    file = _taken(path, wait)
    if file is None:
        yield False
        return
    with file:
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            fcntl.flock(file, fcntl.LOCK_UN)  # workers that were forked meanwhile have the file open too


def _taken(path: Path, wait: bool) -> BinaryIO | None:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its last holder has removed it: take the new one
