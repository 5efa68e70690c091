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
KEPT = 8  # builds of the working tree
SHOWN = 20  # lines of what a build that failed has printed
BUILDERS = ("FASTADV_", "CXX", "LDFLAGS", "CUDA_", "SOURCE_DATE_EPOCH")  # variables that change what is built


class RevisionError(Exception):
    """Git has no such revision, or there is no git."""


class BuildError(Exception):
    """A revision cannot be built."""


class Build(NamedTuple):
    """What is compared: its name, the commit it is (or is based on), and where it can be imported from."""

    name: str
    commit: str
    site: Path


def revision(ref: str) -> Build:
    """A commit, built now or before.

    Raises:
        RevisionError, BuildError: there is no such commit; it does not build.
    """
    commit = resolve(ref)
    return Build(f"{ref} ({commit[:10]})", commit, _built(commit, lambda tree: _archive(commit, tree)))


def working_tree() -> Build:
    """The working tree as it is now, with what is not committed, and without what git ignores."""
    commit, files = resolve("HEAD"), _files()
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    changed = " and changes" if git("status", "--porcelain") else ""
    built = _built(f"tree-{digest.hexdigest()[:16]}", lambda tree: _write(files, tree))
    _forget_old()
    return Build(f"working tree ({commit[:10]}{changed})", commit, built)


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


def _archive(commit: str, tree: Path) -> None:
    """`git archive` rather than a worktree: it leaves nothing in .git that an interrupt would have to take away."""
    command = ["git", "archive", "--format=tar", commit]
    packed = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as files:
        files.extractall(tree, filter="data")


def _files() -> dict[str, bytes]:
    """The working tree's sources, read once, so that what is built is what was hashed."""
    left_out = [f":(exclude){name}" for name in NOT_BUILT]
    listed = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ".", *left_out)
    paths = sorted({name for name in listed.split("\0") if name})
    return {name: (ROOT / name).read_bytes() for name in paths if (ROOT / name).is_file()}


def _write(files: dict[str, bytes], tree: Path) -> None:
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)


def _built(key: str, unpack: Callable[[Path], None]) -> Path:
    """Where `key` is installed. A build takes its place when it is complete, and not before."""
    environment = _environment()
    place = PLACE / f"{key}-{_settings(environment)}"
    if place.exists():
        os.utime(place)  # the latest to be used are kept
        return place / "site"
    print(f"building {place.name}", file=sys.stderr, flush=True)
    PLACE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PLACE, prefix=".", ignore_cleanup_errors=True) as scratch:
        tree, new = Path(scratch, "tree"), Path(scratch, "new")
        unpack(tree)
        _install(place.name, tree, new / "site", environment)
        try:
            new.rename(place)
        except OSError:
            if not place.exists():  # else another run has built the same meanwhile
                raise
    return place / "site"


def _environment() -> dict[str, str]:
    """C++ must build; CUDA is left out unless it is asked for, for what is timed runs on the CPU."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
    return {"FASTADV_NATIVE": "1", "FASTADV_CUDA": "0", **inherited}


def _settings(environment: dict[str, str]) -> str:
    """What a build depends on beside its sources."""
    chosen = sorted(item for item in environment.items() if item[0].startswith(BUILDERS))
    return hashlib.sha256(repr((chosen, sys.version, sys.prefix)).encode()).hexdigest()[:8]


def _install(name: str, tree: Path, site: Path, environment: dict[str, str]) -> None:
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), str(tree)]
    with subprocess.Popen(
        command,
        cwd=tree.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # with its compilers, which would go on writing into a folder that is taken away
    ) as pip:
        try:
            printed, _ = pip.communicate()
        except BaseException:
            os.killpg(pip.pid, signal.SIGKILL)
            raise
    if pip.returncode:
        raise BuildError(f"{name} does not build:\n" + "\n".join(printed.splitlines()[-SHOWN:]))


def _forget_old() -> None:
    """Each edit of the working tree is a build of its own."""
    builds = sorted(PLACE.glob("tree-*"), key=lambda place: place.stat().st_mtime)
    for place in builds[:-KEPT]:
        shutil.rmtree(place, ignore_errors=True)
