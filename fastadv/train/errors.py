"""Stop a command with one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fastadv.train.shown import visible


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
