"""Stop a command with one line that says what to do."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastadv.integrations.full_disk import is_full
from fastadv.jobs.shown import visible

UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO}


class _OneLine(Exception):  # noqa: N818 - the base of what is an error and of what is none
    """Hold one line without control characters, whatever names and labels it quotes."""

    def __init__(self, message: object) -> None:
        super().__init__(visible(message))


class UserError(_OneLine):
    """Report a mistake in the command, the data or a checkpoint. The command prints it without a traceback."""


class Interrupted(_OneLine):
    """Report that the user stopped the job; finished work is saved."""


@contextmanager
def loading(what: str, advice: str) -> Iterator[None]:
    """Turn any error of a library that loads a file into one line.

    Raises:
        UserError: `what` (the first line of the library's message): `advice`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - what a loader raises depends on the file it is given
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what} ({lines[0]}): {advice}") from None


@contextmanager
def writing(folder: Path, then: str) -> Iterator[None]:
    """Turn the error of a disk that is full, or of a folder that cannot be written to, into one line.

    Raises:
        UserError: what is wrong, that finished work is kept, and `then`: how to go on.
    """
    try:
        yield
    except Exception as error:
        if is_full(error, folder):
            kept = "what was finished is kept"
            raise UserError(f"the disk of {folder} is full; {kept}. Make room, then: {then}") from None
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise UserError(f"{error}: what was finished is kept. When it can be written to: {then}") from None
        raise
