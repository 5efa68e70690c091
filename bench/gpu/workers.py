"""Processes that work by a journal: watched, ended with all that they have started, and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.gpu.journal import Journal, Seen

ROOT = Path(__file__).parents[2]
GRACE = 15.0  # seconds beyond a piece's own watchdog
STARTING, ENDING = 120.0, 60.0  # seconds until a process has begun its first piece, and until it ends after the last


REPORT = "{report}"  # in a command: a file of its own for each start, beside the log


class Worker:
    """A command that works through a plan. It is started anew until all has begun, or a start gets nothing begun."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.name, self.command, self.environment = name, list(command), {**os.environ, **environment}
        stem = name.replace(" ", "_").replace(",", "").replace("/", "_of_")
        self.log, self.journal = folder / f"{stem}.txt", Journal(folder / f"{stem}.jsonl")
        for file in (self.log, self.journal.path):
            file.unlink(missing_ok=True)
        self.note, self.starts, self.status = "", 0, 0
        self._start()

    def poll(self) -> bool:
        """Look after it. Whether it still works."""
        if self.process is None:
            return False
        seen, now = self.journal.read(), time.time()
        between = ENDING if seen.planned and not seen.left else STARTING
        ends = [begun.at + begun.limit + GRACE for begun in seen.running.values()] or [self._heard() + between]
        if self.process.poll() is None and now < max(ends):
            return True
        self._end()
        self._bury(seen := self.journal.read())
        if seen.planned and not seen.left:
            return False
        if len(seen.begun) == self._begun:
            self.note = self.note or f"a start got nothing done (exit status {self.status}): see {self.log.name}"
            return False
        self._start()
        return True

    def stop(self) -> None:
        """There is no time left."""
        if self.process is not None:
            self._end(3)
            for name in (seen := self.journal.read()).running:
                self.journal.end(name, outcome="failed", message="out of time", failed="out of time")
            self.note = "out of time" if seen.left or not seen.planned else self.note

    def kill(self) -> None:
        """It and its children, without waiting for them."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def _start(self) -> None:
        self.starts += 1
        self._begun, self._started = len(self.journal.read().begun), time.time()
        # With "=": of a path that stands alone, pytest takes its root and so the tests' names.
        report = str(self.log.with_suffix(f".{self.starts}.xml"))
        command = [part.replace(REPORT, report) for part in self.command]
        command += [f"--journal={self.journal.path}", f"--parent={os.getpid()}"]
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                command, cwd=ROOT, env=self.environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def _heard(self) -> float:
        """When it was started, or last wrote."""
        path = self.journal.path
        return max(self._started, path.stat().st_mtime if path.exists() else 0.0)

    def _end(self, patience: float = 10) -> None:
        """It is gone, or held by the driver for longer than we wait."""
        assert self.process is not None
        self.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.status = self.process.wait(patience)
        self.process = None

    def _bury(self, seen: Seen) -> None:
        """What it died of has ended as well."""
        for name, begun in seen.running.items():
            hung = time.time() >= begun.at + begun.limit
            why = f"hung for {begun.limit:.0f} s" if hung else f"its process died: {died_of(self.status)}"
            self.journal.end(name, outcome="failed", message=f"{why}: see {self.log.name}", failed=why)


def died_of(status: int) -> str:
    try:
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"
    except ValueError:
        return f"signal {-status}"
