"""A process with one revision's fastadv: both ends of the pipe to it, which carries a line of JSON each way.

`python -m bench.compare.worker SITE FOLDER THREADS` prepares cases and runs them once at a time, as it is told. The
cases and the engine that times them are this checkout's in both processes: only fastadv differs.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.compare.build import ROOT, Build, RevisionError
from bench.contest import Field, answer
from bench.machine import environment
from bench.race import Copy, once, quiet
from bench.workloads import SIZES, workload

CONTROL = "plain training (control)"  # nothing of fastadv: a mark here says that the machine was not quiet
SLOW = "training step, PGD-3, a compiled model"  # compiles anew in every round


class Worker:
    """The parent's end."""

    def __init__(self, side: str, build: Build, folder: Path, threads: int) -> None:
        self.build, self.log = build, folder / f"{side}.log"
        self.variables = environment(threads, os.environ)
        paths = (build.site, ROOT, os.environ.get("PYTHONPATH"))  # the revision's fastadv comes before the one in ROOT
        self.variables["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths if path)
        self.arguments = [str(build.site), str(folder / f"{side}.pt"), str(threads)]
        self.start()

    def start(self) -> None:
        """Start the process, and wait until it says what it has imported."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bench.compare.worker", *self.arguments],
                cwd=self.build.site.parent,  # comes first of all, and has no fastadv
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.variables,
                text=True,
                start_new_session=True,  # Ctrl-C is for the parent
            )
        self.found = self._answer()
        if self.found is None:
            raise RevisionError(f"{self.build.name} does not run: {self._last_words()}")

    def ask(self, do: str, **what: object) -> dict[str, Any]:
        """The process's answer. One that died is replaced, and its death is the answer."""
        pipe: Any = self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            pipe.write(json.dumps({"do": do, **what}) + "\n")
            pipe.flush()
        found = self._answer()
        if found is not None:
            return found
        error = f"the process died ({self.process.wait()}): {self._last_words()}"
        self.close()
        self.start()
        return {"error": error}

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]

    def _answer(self) -> Any:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        return json.loads(line) if line else None

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "without a word")


def compared() -> dict[str, tuple[Callable[[], Field], str]]:
    """What makes a case, and whose rounds are compared: fastadv's."""
    from bench.cases import cases  # here, for it imports fastadv

    every = cases(SIZES["compare"])
    found = {name: (case.make, "fused") for name, case in every.items() if name != SLOW}
    return {**found, CONTROL: (every["step of a method, FGSM"].make, "plain")}


class Bench:
    """The process's end: what it can be told."""

    def __init__(self, file: str) -> None:
        self.file, self.copy, self.cases = file, Copy(SIZES["compare"].copy), compared()
        self.entry: Any = None

    def prepare(self, case: str, compare: bool) -> dict[str, Any]:
        """Make a case and run it once; leave its answer in a file, if that is asked for."""
        self.entry = None
        workload.cache_clear()
        gc.collect()
        make, who = self.cases[case]
        field = make()
        found = answer(field, field.entries[who])
        if compare:
            torch.save([one.detach().clone() for one in found], self.file)
        self.entry = field.entries[who]
        return {"answer": self.file, "tolerance": field.tolerance}

    def run(self) -> dict[str, Any]:
        """Run the case once, behind a copy that leaves the caches cold."""
        return {"seconds": once(self.entry, self.copy)()[1]}


def import_from(site: Path) -> Any:
    """The fastadv that is in `site`. The finder of an editable install would fill in what a revision lacks."""
    editable = "__editable___fastadv"
    sys.meta_path[:] = [one for one in sys.meta_path if editable not in (getattr(one, "__module__", None) or "")]
    fastadv = importlib.import_module("fastadv")
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.split(".")[0] == "fastadv" and file and site.resolve() not in Path(file).resolve().parents:
            raise ImportError(f"{name} came from {file}, and not from {site}")
    return fastadv


def main() -> None:
    """Answer until nobody asks any more."""
    site, file, threads = sys.argv[1:]
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    fastadv = import_from(Path(site))
    torch.set_num_threads(int(threads))
    bench = Bench(file)
    hello = {"fastadv": fastadv.__version__, "file": fastadv.__file__, "torch": torch.__version__}
    channel.write(json.dumps({**hello, "threads": torch.get_num_threads()}) + "\n")
    with quiet():
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = getattr(bench, request.pop("do"))(**request)
            except Exception as error:  # noqa: BLE001 - whatever a revision lacks, the rest of it can be compared
                reply = {"error": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
            channel.write(json.dumps(reply) + "\n")


if __name__ == "__main__":
    main()
