"""What a command stops with: one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something in the command, the data or a checkpoint that its user can put right. Printed without a traceback."""


class Interrupted(Exception):  # noqa: N818 - nothing went wrong
    """The user stopped the job; what was done is saved."""


@contextmanager
def loading(what: str, advice: str) -> Iterator[None]:
    """Turn whatever a library raises while it loads something into one line.

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
