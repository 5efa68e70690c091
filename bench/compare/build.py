"""A revision made importable: its sources are unpacked, built and installed into a folder of their own.

`kernels/` is a mapped package, so that a source tree cannot be imported as it lies there. Builds stay in build/compare:
a commit's until `make clean`, of the working tree's the latest few.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PLACE = ROOT / "build/compare"
NOT_BUILT = ("bench", "tests", "docs", "examples")  # editing these is no reason to build again
KEPT = 8  # builds of the working tree: each edit is one
BUILDERS = ("FASTADV_", "CXX", "LDFLAGS", "CUDA_", "SOURCE_DATE_EPOCH")  # variables that change what is built
OPTIONS = ("--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet")


class RevisionError(Exception):
    """Git has no such revision, or it cannot be built."""


class Build(NamedTuple):
    """What is compared: its name, the commit it is (or is based on), and where it can be imported from."""

    name: str
    commit: str
    site: Path


def revision(ref: str) -> Build:
    """A commit, built now or before."""
    commit = resolve(ref)

    def unpack(tree: Path) -> None:
        """By `git archive`: a worktree would leave something in .git that an interrupt had to take away."""
        command = ["git", "archive", "--format=tar", commit]
        packed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as files:
            files.extractall(tree, filter="data")

    return Build(f"{ref} ({commit[:10]})", commit, _built(commit, unpack))


def working_tree() -> Build:
    """The working tree as it is now, with what is not committed, and without what git ignores."""
    left_out = [f":(exclude){name}" for name in NOT_BUILT]
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", *left_out).split("\0")
    files = {name: (ROOT / name).read_bytes() for name in sorted(set(listed)) if (ROOT / name).is_file()}  # read once

    def unpack(tree: Path) -> None:
        for name, content in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes(content)

    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    site = _built(f"tree-{digest.hexdigest()[:16]}", unpack)
    for place in sorted(PLACE.glob("tree-*"), key=lambda place: place.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(place, ignore_errors=True)
    commit, changed = resolve("HEAD"), " and changes" if git("status", "--porcelain") else ""
    return Build(f"working tree ({commit[:10]}{changed})", commit, site)


def resolve(ref: str) -> str:
    """The full name of a commit."""
    command = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    return git(*command, otherwise=f"git knows no revision {ref!r} here (a shallow clone lacks older ones)").strip()


def git(*arguments: str, otherwise: str = "git failed") -> str:
    """What git prints. Where it fails without a word, the error says `otherwise`."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError as missing:
        raise RevisionError("git is not installed") from missing
    if done.returncode:
        raise RevisionError(next(iter(done.stderr.splitlines()), otherwise))
    return done.stdout


def _built(key: str, unpack: Callable[[Path], None]) -> Path:
    """Where `key` is installed. A build takes its place when it is complete, and not before."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
    environment = {"FASTADV_NATIVE": "1", "FASTADV_CUDA": "0", **inherited}  # what is timed runs on the CPU
    place = PLACE / f"{key}-{settings(environment)}"
    if place.exists():
        os.utime(place)  # the latest to be used are kept
        return place / "site"
    print(f"building {place.name}", file=sys.stderr, flush=True)
    PLACE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PLACE, prefix=".", ignore_cleanup_errors=True) as scratch:
        tree, new = Path(scratch, "tree"), Path(scratch, "new")
        unpack(tree)
        command = [sys.executable, "-m", "pip", "install", *OPTIONS, "--target", str(new / "site"), str(tree)]
        _run(command, place.name, Path(scratch), environment)
        try:
            new.rename(place)
        except OSError:
            if not place.exists():  # else another run has built the same meanwhile
                raise
    return place / "site"


def settings(environment: dict[str, str]) -> str:
    """What a build depends on beside its sources."""
    chosen = sorted(item for item in environment.items() if item[0].startswith(BUILDERS))
    return hashlib.sha256(repr((chosen, sys.version, sys.prefix)).encode()).hexdigest()[:8]


def _run(command: list[str], name: str, folder: Path, environment: dict[str, str]) -> None:
    """In a session of its own, to end compilers too: they would go on writing into a folder that is taken away."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=folder, env=environment, text=True, start_new_session=True, **pipes) as pip:
        try:
            printed, _ = pip.communicate()
        except BaseException:
            os.killpg(pip.pid, signal.SIGKILL)
            raise
    if pip.returncode:
        raise RevisionError(f"{name} does not build:\n" + "\n".join(printed.splitlines()[-20:]))
