"""JSON files of a run: written whole or not at all, and read with an error that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastadv.integrations import files
from fastadv.jobs.errors import UserError


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all, and on the disk."""
    files.write(path, json.dumps(value, indent=1, default=str) + "\n")


def read_json(path: Path, advice: str = "remove it and run again") -> Any:
    """Read a file of `write_json`; None if there is none. `advice`: for one that cannot be read.

    Raises:
        UserError: the file is there and is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): {advice}") from None
