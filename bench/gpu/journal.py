"""The journal of a process: a line as each piece of work begins and ends, so that it outlives any death."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ERRORS = os.dup(2)  # pytest puts a file of its own in place of the second descriptor


class Begun(NamedTuple):
    """When a piece began, by the clock of the machine, and how many seconds it may take."""

    at: float
    limit: float


class Seen(NamedTuple):
    """What a journal says: all pieces there are, and what became of those that have begun."""

    planned: list[str]
    begun: dict[str, Begun]
    ended: dict[str, dict[str, Any]]

    @property
    def running(self) -> dict[str, Begun]:
        return {name: begun for name, begun in self.begun.items() if name not in self.ended}

    @property
    def left(self) -> list[str]:
        return [name for name in self.planned if name not in self.begun and name not in self.ended]


class Journal:
    """Lines of JSON; the process that works appends to it, and so does the one that saw it die."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def plan(self, names: Sequence[str]) -> None:
        self._write(planned=list(names))

    def begin(self, name: str, limit: float) -> None:
        """From now on, a watchdog that needs no Python ends this process if `name` has not ended in time."""
        self._write(begin=name, at=time.time(), limit=limit)
        faulthandler.dump_traceback_later(limit, exit=True, file=ERRORS)

    def end(self, name: str, **found: Any) -> None:
        faulthandler.cancel_dump_traceback_later()
        self._write(end=name, found=found)

    def read(self) -> Seen:
        """All that was written in full."""
        seen = Seen([], {}, {})
        for text in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:  # it died while it wrote
                continue
            seen.planned.extend(name for name in line.get("planned", ()) if name not in seen.planned)
            if "begin" in line:
                seen.begun[line["begin"]] = Begun(line["at"], line["limit"])
            if "end" in line:
                seen.ended[line["end"]] = line["found"]
        return seen

    def _write(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def die_with(parent: int) -> None:
    """End this process group when `parent`, which watches it, has been killed: a GPU must not stay in use."""

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
