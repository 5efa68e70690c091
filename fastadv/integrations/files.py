"""Write files whole or not at all, and on the disk when the call returns."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path


def write(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8), or leave what was there.

    A kill or a power cut at any time leaves the old content or the new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written to; what was there is unchanged.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from fastadv.integrations.files import write
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(Path(folder, "a.json"), "{}")
        ...     print(Path(folder, "a.json").read_text())
        {}
    """
    # Named by its writer: two that write the same file must not share it.
    start = f".{path.name}.{os.uname().nodename}"
    temporary = path.with_name(f"{start}.{os.getpid()}.{threading.get_ident()}.tmp")
    _remove_of_dead(path.parent, start)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _remove_of_dead(folder: Path, start: str) -> None:
    """Remove what processes of this machine left that were killed while they wrote the same file."""
    for path in folder.iterdir():
        name, *writer = path.name.rsplit(".", 3)
        if name == start and len(writer) == 3 and writer[0].isdecimal() and writer[2] == "tmp":
            try:
                os.kill(int(writer[0]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except PermissionError:
                pass  # somebody else's, and alive


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until all files under a folder, and their names, are on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))


def remove_leftovers(folder: Path) -> None:
    """Remove what `write` left in a folder when it was killed; nobody may be writing there."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)
