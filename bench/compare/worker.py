"""A process with one revision's fastadv: both ends of the pipe to it, which carries a line of JSON each way.

`python -m bench.compare.worker SITE FOLDER THREADS` prepares cases and runs them once at a time, as it is told.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.compare.build import ROOT, Build, BuildError
from bench.compare.cases import CASES, Case, tensors
from bench.machine import environment
from bench.race import Copy

COPIED = 64 << 20  # elements that are copied before every run: more than any cache holds


class Worker:
    """The parent's end."""

    def __init__(self, side: str, build: Build, folder: Path, threads: int) -> None:
        self.side, self.build, self.folder, self.threads = side, build, folder, threads
        self.start()

    def start(self) -> None:
        """Start the process, and wait until it says what it has imported.

        Raises:
            BuildError: it does not get so far.
        """
        self.log = self.folder / f"{self.side}.log"
        variables = environment(self.threads, os.environ)
        paths = [str(self.build.site), str(ROOT)]  # the revision's fastadv comes before the one in ROOT
        variables["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
        arguments = [str(self.build.site), str(self.folder / f"{self.side}.pt"), str(self.threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.compare.worker", *arguments],
                cwd=self.build.site.parent,  # comes first of all, and has no fastadv
                env=variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        self.found = self._answer()
        if self.found is None:
            raise BuildError(f"{self.build.name} does not run: {self._last_words()}")

    def ask(self, do: str, **what: object) -> dict[str, Any]:
        """The process's answer. One that died is replaced, and its death is the answer."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")
            self.process.stdin.flush()
        answer = self._answer()
        if answer is not None:
            return answer
        error = f"the process died ({self.process.wait()}): {self._last_words()}"
        self.close()
        self.start()
        return {"error": error}

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _answer(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "without a word")


class Bench:
    """The process's end: what it can be told."""

    def __init__(self, answer: str) -> None:
        self.file, self.copy = answer, Copy(COPIED)
        self.case: Case | None = None

    def prepare(self, case: str, answer: bool) -> dict[str, Any]:
        """Make a case and run it once; leave its result in a file, if that is asked for."""
        self.case = None
        gc.collect()
        made = CASES[case].make()
        made.setup()
        result = made.found(made.run())
        if answer:
            torch.save([one.detach().clone() for one in tensors(result)], self.file)
        self.case = made
        return {"answer": self.file}

    def run(self) -> dict[str, Any]:
        """Run the case once, behind a copy that leaves the caches cold."""
        if self.case is None:
            raise RuntimeError("nothing is prepared")
        self.case.setup()
        gc.collect()
        self.copy()
        start = time.perf_counter()
        self.case.run()
        return {"seconds": time.perf_counter() - start}


def serve(bench: Bench, channel: Any) -> None:
    """Answer until nobody asks any more."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(bench, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - whatever a revision lacks, the rest of it can be compared
            reply = {"error": first_line(error)}
        channel.write(json.dumps(reply) + "\n")


def first_line(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def import_from(site: Path) -> Any:
    """The fastadv that is in `site`. The finder of an editable install would fill in what a revision lacks."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable___fastadv" not in _module(finder)]
    fastadv = importlib.import_module("fastadv")
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == "fastadv" and file and site.resolve() not in Path(file).resolve().parents:
            raise ImportError(f"{name} came from {file}, and not from {site}")
    return fastadv


def _module(finder: object) -> str:
    return getattr(finder, "__module__", None) or ""


def main() -> None:
    site, answer, threads = sys.argv[1:]
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    fastadv = import_from(Path(site))
    torch.set_num_threads(int(threads))
    bench = Bench(answer)
    gc.disable()
    gc.freeze()  # so that a collection before each run takes no time
    hello = {"fastadv": fastadv.__version__, "file": fastadv.__file__, "torch": torch.__version__}
    channel.write(json.dumps({**hello, "threads": torch.get_num_threads()}) + "\n")
    serve(bench, channel)


if __name__ == "__main__":
    main()
