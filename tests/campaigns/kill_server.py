"""Run the command again and again in processes of its own, which need not import torch first: they are forked.

A line of JSON on standard input is a job: its arguments, its folder, the file for what it prints, and when to kill it.
A line of JSON on standard output is how it ended. A job is a real process with real files, and the kill is SIGKILL.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

POLL = 0.0005  # seconds


def main() -> None:
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    begun = time.perf_counter()
    child = os.fork()
    if child == 0:
        _work(job)
    status = _kill(child, job, begun)
    return {
        "killed": os.WIFSIGNALED(status),
        "code": os.waitstatus_to_exitcode(status),
        "seconds": time.perf_counter() - begun,
    }


def _work(job: dict[str, Any]) -> None:
    """The job, in the child, which never returns."""
    code: Any = 1
    try:
        os.setsid()
        os.chdir(job["folder"])
        output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        from fastadv.cli import main as command

        command(job["arguments"])
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:  # noqa: BLE001 - whatever it is, a child of a fork must not go on
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _kill(child: int, job: dict[str, Any], begun: float) -> int:
    """Wait for the child; kill it after `after` seconds, or `after` seconds after a file that matches `seen` is new."""
    after, seen = job.get("after"), job.get("seen")
    since = None if seen else begun
    known = _found(job["folder"], seen) if seen else set()
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        if since is None and _found(job["folder"], seen) - known:
            since = time.perf_counter()
        if after is not None and since is not None and time.perf_counter() - since >= after:
            os.kill(child, signal.SIGKILL)
            after = None
        time.sleep(POLL if after is not None else 0.01)


def _found(folder: str, pattern: str) -> set[Path]:
    try:
        return set(Path(folder).glob(pattern))
    except OSError:  # a folder that was moved away meanwhile
        return set()


if __name__ == "__main__":
    for part in ("compare", "run", "sweep", "tables", "verdict"):  # once, and not in each child
        importlib.import_module(f"fastadv.train.{part}")
    main()
