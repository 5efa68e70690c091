"""Make the folder of a run, find one to go on with, and hold it against other processes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from fastadv.integrations import files
from fastadv.jobs.errors import UserError
from fastadv.jobs.folders import RESULT, SETTINGS

TAKEN = "{folder} is being written to by another fastadv: wait until it ends, or stop it"


class Unfinished(NamedTuple):
    """Hold the run that --resume found, and what to tell of the others."""

    folder: Path
    said: list[str]


def check(folder: Path) -> None:
    """Refuse a folder that is not empty, before anything is read.

    Raises:
        UserError: it is not.
    """
    if (folder / SETTINGS).exists():
        state = "a finished run" if (folder / RESULT).exists() else "an unfinished run: --resume continues it"
        raise UserError(f"{folder} holds {state}. Give another --output-dir, or remove the folder")
    if folder.exists() and (not folder.is_dir() or any(not _is_leftover(one) for one in folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give another --output-dir")


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".tmp"  # of a run that was killed before it began


@contextlib.contextmanager
def new(folder: Path | None, runs: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Make the folder of a new run, with its settings, and hold it. None: one of its own in `runs`, named by the time.

    Its settings are what makes a folder a run: they are there whole or not at all, and one process can make them.

    Raises:
        UserError: the folder cannot be made, or another run has it.
    """
    try:
        made = _by_time(runs) if folder is None else folder
        made.mkdir(parents=True, exist_ok=True)
        opened = _create(made, json.dumps(settings, indent=1, default=str) + "\n")
    except FileExistsError:
        raise UserError(f"{folder} was taken by another run meanwhile: give another --output-dir") from None
    except OSError as error:
        raise UserError(
            f"{folder or runs} cannot be written to ({error.strerror}): give another --output-dir"
        ) from None
    with _closing(opened):
        yield made


@contextlib.contextmanager
def held(folder: Path) -> Iterator[Path]:
    """Hold the folder of a run that goes on. The lock ends with the process, however it ends.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """
    try:
        opened = (folder / SETTINGS).open("r+b")
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): change its permissions") from None
    with _closing(opened):
        if not _lock(opened):
            raise UserError(TAKEN.format(folder=folder))
        files.remove_leftovers(folder)
        yield folder


def latest_unfinished(runs: Path) -> Unfinished:
    """Choose the unfinished run that was written to last.

    Raises:
        UserError: there is none.
    """
    started = [path.parent for path in runs.glob(f"*/{SETTINGS}")]
    waiting = sorted((one for one in started if not (one / RESULT).exists()), key=last_written, reverse=True)
    busy = [one for one in waiting if _is_held(one)]
    said = [f"{one} is passed over: another fastadv trains it" for one in busy]
    for one in waiting:
        if one not in busy:
            when = datetime.fromtimestamp(last_written(one)).isoformat(" ", "seconds")
            return Unfinished(one, [*said, f"{one} goes on: of the unfinished runs in {runs}/ the latest ({when})"])
    raise UserError(
        "; ".join([*said, f"no unfinished run in {runs}/"])
        + ": say which to continue with --output-dir, or leave --resume out"
    )


def last_written(folder: Path) -> float:
    """Return the time of a run's last progress: of its settings, log, models and checkpoints."""
    times = []
    for path in (*folder.glob("*"), *folder.glob("*/*")):
        with contextlib.suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def _by_time(runs: Path) -> Path:
    """Make a folder that no other run has, also not one that began in the same second."""
    runs.mkdir(parents=True, exist_ok=True)
    name, count = datetime.now().strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = runs / (name if count == 1 else f"{name}-{count}")
        try:
            folder.mkdir()
        except FileExistsError:
            count += 1
        else:
            return folder


def _create(folder: Path, content: str) -> IO[bytes]:
    """Create the settings whole, locked from the first moment on.

    Raises:
        FileExistsError: they are there.
    """
    temporary = folder / f".{SETTINGS}.{os.getpid()}.tmp"
    opened = temporary.open("w+b")
    try:
        _lock(opened)
        opened.write(content.encode())
        opened.flush()
        os.fsync(opened.fileno())
        os.link(temporary, folder / SETTINGS)  # unlike a rename it replaces nothing
    except BaseException:
        opened.close()
        raise
    finally:
        temporary.unlink(missing_ok=True)
    files.sync(folder)
    return opened


def _lock(opened: IO[bytes]) -> bool:
    """Lock a file for this process alone; False where another has it. Some file systems have no locks: then True."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in {errno.EWOULDBLOCK, errno.EACCES}
    return True


@contextlib.contextmanager
def _closing(opened: IO[bytes]) -> Iterator[None]:
    """Close the file in the end, and at once in children: a worker that outlives its parent must not hold the run."""
    os.register_at_fork(after_in_child=opened.close)
    with opened:
        yield


def _is_held(folder: Path) -> bool:
    try:
        with (folder / SETTINGS).open("r+b") as opened:
            return not _lock(opened)
    except OSError:
        return False  # the choice of this run says what is wrong with it
