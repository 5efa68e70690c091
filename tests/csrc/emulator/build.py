"""Builds the extension with csrc/*.cu for the emulator, and the kernels alone as a library, once for all workers.

What lies in `build/emulator` is named by a hash of all that it was made from.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shlex
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pybind11

from fastadv.native import toolchain

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
FOLDER = ROOT / "build" / "emulator"
SOURCES = {path.name: path for folder in (ROOT / "csrc", HERE) for path in sorted(folder.glob("*.*"))}
HOST = [name for name in SOURCES if name.endswith("_cpu.cpp")]
KERNELS = [name for name in SOURCES if name.endswith("_cuda.cu")]

# Another namespace: Python knows the types of the installed extension, and must not take one for the other.
COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-DFASTADV_WITH_CUDA",
    "-Dfastadv=emulated",
]
EMULATED = ["-O1", "-fno-strict-aliasing", "-fsanitize=alignment", "-D__CUDACC__", "-xc++"]

LAUNCH = re.compile(r"\b(\w+_kernel(?:<[^;{}]*?>)?)<<<(.*?)>>>\((.*?)\);", re.DOTALL)
SHARED = re.compile(r"\b__shared__ (\w+) (\w+)\[(.+?)\];")
INCLUDE = re.compile(r'^#include "(.+?)"', re.MULTILINE)


class Patch(NamedTuple):
    """A change to the text of a file in csrc/."""

    file: str
    old: str
    new: str


class Built(NamedTuple):
    """The extension, and the kernels that it is to run."""

    extension: Path
    kernels: Path


def rewritten(text: str) -> str:
    """What only nvcc understands, as calls of emulator.h. No line moves."""
    text = LAUNCH.sub(r"emulator::launch(\2, [](auto... given) { \1(given...); }, \3);", text)
    return SHARED.sub(r"static emulator::Shared<\1[\3]> \2;", text)


def build(patches: Sequence[Patch] = ()) -> Built:
    """The extension, from csrc/ as it is, and the kernels with `patches`."""
    texts = {name: path.read_text(encoding="utf-8") for name, path in SOURCES.items()}
    plain = {name: rewritten(text) for name, text in texts.items()}
    for patch in patches:
        assert texts[patch.file].count(patch.old) == 1, f"{patch.file} does not have once: {patch.old}"
        texts[patch.file] = texts[patch.file].replace(patch.old, patch.new)
    patched = {name: rewritten(text) for name, text in texts.items()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = functools.partial(pool.submit, _object)
        module = [compiling(plain, name, ["-O0", *_python()]) for name in ("module.cpp", *HOST, "forward.cpp")]
        kernels = [compiling(patched, name, EMULATED) for name in KERNELS]
        emulator, entries = (compiling(plain, name, ["-O2"]).result() for name in ("emulator.cpp", "library.cpp"))
        return Built(
            _library("_C.so", [emulator, *(made.result() for made in module)]),
            _library("kernels.so", [emulator, entries, *(made.result() for made in kernels)]),
        )


def _python() -> list[str]:
    paths = [pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    return [f"-isystem{path}" for path in dict.fromkeys(paths)]


@functools.cache
def _cxx() -> toolchain.Cxx:
    return toolchain.find_cxx()


def _object(texts: dict[str, str], name: str, flags: Sequence[str]) -> Path:
    needed = {header: texts[header] for header in _included(texts, name)}
    flags = [*COMMON, *flags, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    target = FOLDER / f"{_hash(_cxx().version, *flags, *needed, *needed.values())}-{name}.o"
    with _once(target) as missing:
        if missing:
            with tempfile.TemporaryDirectory() as folder:
                for header, text in needed.items():
                    (Path(folder) / header).write_text(text, encoding="utf-8")
                _run([*_cxx().command, *flags, f"-I{folder}", "-c", f"{folder}/{name}"], target)
    return target


def _library(name: str, objects: Sequence[Path]) -> Path:
    flags = ["-shared", *shlex.split(os.environ.get("LDFLAGS", "")), "-ldl"]
    target = FOLDER / _hash(*flags, *(made.name for made in objects)) / name
    with _once(target) as missing:
        if missing:
            _run([*_cxx().command, *map(str, objects), *flags], target)
    return target


def _included(texts: dict[str, str], name: str) -> dict[str, None]:
    """The file, and what of ours it includes, directly or not."""
    found: dict[str, None] = {}
    left = [name]
    while left:
        one = left.pop()
        if one in texts and one not in found:
            found[one] = None
            left += INCLUDE.findall(texts[one]) + ["cuda_runtime_api.h"] * ("<cuda_runtime_api.h>" in texts[one])
    return found


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _once(target: Path) -> Iterator[bool]:
    """Whether the file is to be made; nobody else makes it meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not target.exists()


def _run(command: Sequence[str], target: Path) -> None:
    """Makes the file in one piece, or not at all."""
    made = target.with_suffix(".part")
    toolchain.run([*command, "-o", str(made)])
    made.replace(target)
