"""Try an output before the work begins: what cannot be written is said in one line, and not after hours of training."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fastadv.jobs.errors import UserError

NEEDED = 2**16  # bytes: a disk that has not even these is full


def check_files(folder: Path, names: Iterable[str], option: str = "--output-dir") -> None:
    """Try to write files of these names in a folder, which may not be there yet. Nothing is left of the attempt.

    Raises:
        UserError: that cannot be. It says why, and names `option`.
    """
    try:
        _try(folder)
        wrong = [folder / name for name in names if (folder / name).exists() and not (folder / name).is_file()]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be written to ({_reason(error)}): give another {option}") from None
    if wrong:
        raise UserError(f"{wrong[0]} is in the way, and is no file: remove it, or give another {option}")


def check_file(path: Path, option: str) -> None:
    """Try to write a file: one that is there, a device, or a new one in a folder that is there.

    Raises:
        UserError: that cannot be. It says why, and names `option`.
    """
    try:
        if path.is_file() or path.is_dir():
            os.close(os.open(path, os.O_WRONLY))
        elif not path.exists():
            _write(path.absolute().parent)
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path} cannot be written ({_reason(error)}): check the path") from None


def _try(folder: Path) -> None:
    """Write into the folder, or into the nearest one above it that is there."""
    for place in (folder.absolute(), *folder.absolute().parents):
        if os.path.lexists(place):
            _write(place)
            return


def _write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(NEEDED))
        file.flush()
        os.fsync(file.fileno())


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
