"""The core tests under other Pythons and torches: `make versions`, `make versions ARGS="-s 'core-3.12(newest)'"`.

Each session installs the package from a copy of the tree, C++ part and all, with a torch of its own, and runs the tests
of the engine, the methods and the ops. A torch that brings CUDA's libraries along is several GB: `-- --all` takes
it nonetheless. `-- --write` keeps what ran in docs/results/versions.json and shows it in docs/versions.md.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import nox

ROOT = Path(__file__).resolve().parents[1]
RECORD, PAGE = ROOT / "docs/results/versions.json", ROOT / "docs/versions.md"
BEGIN, END = "<!-- begin: written by `make versions` -->", "<!-- end -->"
SOURCES = ("fastadv", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
TORCHES = ("2.6", "2.11", "2.13", "newest")
NEEDS = ("pytest>=8", "hypothesis", "numpy", "transformers>=5")
# Where a change of Python or torch would show: hooks, copies, autocast, every method, each op's way to its backend.
CORE = (
    *(
        f"tests/contracts/test_{name}.py"
        for name in ("lifecycle", "copies", "autocast", "checkpointing", "structure", "tied")
    ),
    *(f"tests/contracts/test_{name}.py" for name in ("faults", "masks", "closures", "replaced_parts", "dropped")),
    *(f"tests/engine/test_{name}.py" for name in ("capture", "embedding", "interception", "ready", "rng")),
    *(f"tests/engine/test_{name}.py" for name in ("interrupts", "surroundings")),
    "tests/csrc/test_failures.py",
    *(f"tests/methods/test_{name}.py" for name in ("fgm", "pgd", "freelb", "freeat", "yopo")),
    *(f"tests/methods/test_{name}.py" for name in ("smart", "proximal", "vat", "llr", "awp", "neftune")),
    *(f"tests/oracles/test_{name}.py" for name in ("goldens", "numbers")),
    *(f"tests/ops/test_{name}.py" for name in ("dispatch", "grads", "rows")),
)

PYENV = Path.home() / ".pyenv/versions"  # where only pyenv's shims are on PATH, they find no Python
os.environ["PATH"] = os.pathsep.join([*(str(one) for one in sorted(PYENV.glob("3.*/bin"))), os.environ["PATH"]])
nox.options.error_on_missing_interpreters = False  # it is skipped, and says so
nox.options.default_venv_backend = "virtualenv"
nox.options.envdir = str(ROOT / "build/nox")


@nox.session(python=PYTHONS)
@nox.parametrize("torch", TORCHES, ids=TORCHES)
def core(session: nox.Session, torch: str) -> None:
    python = str(session.python)
    if "--all" not in session.posargs and not light(python, torch):
        session.skip(f"torch {torch} for Python {python} brings CUDA's libraries, several GB: `-- --all` installs it")
    tree = copy(Path(session.create_tmp()).resolve())
    nothing = dict.fromkeys(("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT"), os.devnull)  # those are for `make test`
    session.install("torch" if torch == "newest" else f"torch=={torch}.*", *NEEDS, env=nothing)
    session.install(str(tree / "source"), env={**nothing, "FASTADV_NATIVE": "1", "FASTADV_CUDA": "0"})
    session.chdir(tree / "run")
    began = time.monotonic()
    report = tree / "report.xml"
    chosen = [argument for argument in session.posargs if argument not in {"--all", "--write"}]
    run = ["python", "-m", "pytest", "-q", "-m", "not slow", f"--junit-xml={report}", *(chosen or CORE)]
    session.run(*run, env={"OMP_NUM_THREADS": "1"}, success_codes=[0, 1])
    done = outcome(session, report, round(time.monotonic() - began))
    if "--write" in session.posargs:
        write(done)
    if done["failed"]:
        session.error(f"{done['failed']} tests failed")


def light(python: str, torch: str) -> bool:
    """Whether pip would install a torch without CUDA's libraries: elsewhere than on x86-64 Linux PyPI has none."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return True
    found = offered(python)
    wanted = [one for one in found if torch == "newest" or one.startswith(f"{torch}.")]
    return bool(wanted) and wanted[0].endswith("+cpu")


@functools.cache
def offered(python: str) -> list[str]:
    """The torches that pip knows for a Python, the newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--only-binary=:all:"]
    nothing = {**os.environ, "PIP_CONSTRAINT": os.devnull}
    done = subprocess.run(
        [*command, "--python-version", python], capture_output=True, text=True, check=False, env=nothing
    )
    listed = re.search(r"Available versions: (.*)", done.stdout)
    return listed[1].split(", ") if listed else []


def copy(scratch: Path) -> Path:
    """A source to install from and a place for the tests, which so meet the package that was installed and no other."""
    shutil.rmtree(scratch)
    (scratch / "source").mkdir(parents=True)
    (scratch / "run").mkdir()
    stale = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", ".nox")
    for place, names in (("source", SOURCES), ("run", ("tests", "bench", "csrc", "pyproject.toml"))):
        for name in names:
            take = functools.partial(shutil.copytree, ignore=stale) if (ROOT / name).is_dir() else shutil.copy
            take(ROOT / name, scratch / place / name)
    return scratch


def outcome(session: nox.Session, report: Path, seconds: int) -> dict[str, Any]:
    """What ran, as docs/results/versions.json keeps it."""
    ask = (
        "import platform as p, torch, fastadv as f; print(p.python_version(), torch.__version__, f.native.available())"
    )
    python, torch, native = str(session.run("python", "-c", ask, silent=True, stderr=None)).split()
    suite = next(ET.parse(report).iter("testsuite"))
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    return {
        "python": python,
        "torch": torch,
        "machine": f"{platform.system()} {platform.machine()}",
        "when": time.strftime("%Y-%m-%d"),
        "native": native == "True",
        "passed": counts["tests"] - failed - counts["skipped"],
        "skipped": counts["skipped"],
        "failed": failed,
        "seconds": seconds,
    }


def write(done: dict[str, Any]) -> None:
    """Puts a run in the place of the last one with that Python and torch, and shows all."""
    kept = json.loads(RECORD.read_text()) if RECORD.exists() else []
    kept = sorted([one for one in kept if key(one) != key(done)] + [done], key=key)
    RECORD.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text()
    before, after = page[: page.index(BEGIN)], page[page.index(END) :]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(kept)}\n{after}", encoding="utf-8")


def key(done: dict[str, Any]) -> list[tuple[int, ...]]:
    """By Python and torch, without what a patch release changes."""
    return [tuple(int(part) for part in re.split(r"[.+a-z]+", done[name])[:2]) for name in ("python", "torch")]


def table(kept: list[dict[str, Any]]) -> str:
    """The runs, for docs/versions.md."""
    lines = ["| Python | torch | passed | skipped | failed | when |", "|---|---|---|---|---|---|"]
    shown = ("python", "torch", "passed", "skipped", "failed", "when")
    return "\n".join([*lines, *("| " + " | ".join(str(one[name]) for name in shown) + " |" for one in kept), ""])
