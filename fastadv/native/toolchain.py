"""Finds the compilers for setup.py. It asks compilers, never the GPU, and imports neither torch nor setuptools."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

# Every generation that a current toolkit may still know; the newest one also goes in as PTX, for what comes after.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
WARNINGS = ["-Wall", "-Wextra"]


class ToolchainError(Exception):
    """A compiler is not there or does not work; the message is the reason that the user will read."""


class Cxx(NamedTuple):
    """A C++ compiler that made a shared library here."""

    command: list[str]
    version: str
    openmp_reason: str | None  # None: it has OpenMP

    def compile_flags(self) -> list[str]:
        # Nobody looks at floating-point exceptions or errno, and with them no choice between two numbers and no square
        # root could be vectorised.
        exact = ["-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
        # NDEBUG: pybind11 would ask at every reference whether the lock is held.
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", *exact, *WARNINGS]
        if march := os.environ.get("FASTADV_MARCH"):
            flags.append(f"-march={march}")
        if self.openmp_reason is None:
            flags.append("-fopenmp")
        return flags + shlex.split(os.environ.get("CXXFLAGS", ""))

    def link_flags(self) -> list[str]:
        flags = ["-fopenmp"] if self.openmp_reason is None else []
        flags += ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        if sys.platform.startswith("linux"):
            flags += ["-Wl,--exclude-libs,ALL"]  # what comes from static libraries stays hidden
        return flags + shlex.split(os.environ.get("LDFLAGS", ""))


class Nvcc(NamedTuple):
    """A CUDA compiler, where its libraries are, and for which architectures to compile."""

    command: str
    version: str
    includes: list[str]
    libraries: list[str]
    architectures: list[str]  # "90", or "90+PTX"

    def compile_flags(self) -> list[str]:
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall", "--threads", "0"]
        if ccbin := os.environ.get("CXX"):
            flags += ["-ccbin", shlex.split(ccbin)[0]]
        for arch in self.architectures:
            number = arch.removesuffix("+PTX")
            flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
            if arch.endswith("+PTX"):
                flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
        return flags

    def link_flags(self) -> list[str]:
        return [*(f"-L{path}" for path in self.libraries), "-lcudart_static", "-ldl", "-lpthread", "-lrt"]


def run(command: list[str], cwd: str | Path | None = None) -> str:
    """Standard output and error together.

    Raises:
        ToolchainError: it could not be started or failed; with the command's last words.
    """
    try:
        done = subprocess.run(
            command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
        )
    except OSError as error:
        raise ToolchainError(f"{command[0]}: {error.strerror or error}") from error
    if done.returncode:
        raise ToolchainError(f"{Path(command[0]).name} failed: {_essence(done.stdout)}")
    return done.stdout


def _essence(output: str) -> str:
    """The first line in which a compiler says "error" or "fatal", or else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.IGNORECASE)]
    return (errors or lines[-1:] or ["no output"])[0][:300]


def find_cxx() -> Cxx:
    """The first C++ compiler that works: CXX, the one Python was built with, then the usual names.

    Raises:
        ToolchainError: none does.
    """
    if sys.platform == "win32":
        raise ToolchainError("the C++ ops are built on Linux and macOS only")
    if chosen := os.environ.get("CXX"):
        return _try_cxx(shlex.split(chosen))
    candidates = [shlex.split(sysconfig.get_config_var("CXX") or ""), ["g++"], ["c++"], ["clang++"]]
    tried = [command for command in candidates if command and shutil.which(command[0])]
    reasons = []
    for command in tried:
        try:
            return _try_cxx(command)
        except ToolchainError as missing:
            reasons.append(str(missing))
    raise ToolchainError("; ".join(dict.fromkeys(reasons)) or "no C++ compiler found (CXX, g++, c++, clang++)")


def _try_cxx(command: list[str]) -> Cxx:
    version = run([*command, "--version"]).splitlines()[0]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "plain.cpp").write_text("int answer() { return 42; }\n", encoding="utf-8")
        (Path(folder) / "openmp.cpp").write_text(
            "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n", encoding="utf-8"
        )
        compiler = [*command, "-std=c++17", "-fPIC", "-shared"]
        run([*compiler, "plain.cpp", "-o", "plain.so"], cwd=folder)
        try:
            run([*compiler, "-fopenmp", "openmp.cpp", "-o", "openmp.so"], cwd=folder)
        except ToolchainError as missing:
            return Cxx(command, version, str(missing))
    return Cxx(command, version, None)


def find_nvcc() -> Nvcc:
    """CUDA's compiler, from CUDA_HOME or CUDA_PATH, or else from PATH.

    Raises:
        ToolchainError: it is not there, or does not work.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if shutil.which("nvcc", path=str(Path(home) / "bin")):
            return _try_nvcc(str(Path(home) / "bin" / "nvcc"))
    found = shutil.which("nvcc")
    if not found:
        raise ToolchainError(
            f"no nvcc in {', '.join(homes)} or on PATH" if homes else "no nvcc (CUDA_HOME, CUDA_PATH, PATH)"
        )
    return _try_nvcc(found)


def _try_nvcc(command: str) -> Nvcc:
    release = re.search(r"release ([\d.]+)", run([command, "--version"]))
    # nvcc may be a wrapper script or a link, so its own folder says nothing: a dry run prints what it would use.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.cu").touch()
        plan = run([command, "--dryrun", "empty.cu"], cwd=folder)
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", run([command, "--list-gpu-arch"]))}
    return Nvcc(
        command,
        release.group(1) if release else "?",
        _paths(plan, "INCLUDES", "-I"),
        _paths(plan, "LIBRARIES", "-L"),
        _architectures(known),
    )


def _paths(plan: str, variable: str, prefix: str) -> list[str]:
    line = re.search(rf"^#\$ {variable}=(.*)$", plan, re.MULTILINE)
    words = shlex.split(line.group(1)) if line else []
    return [os.path.realpath(word.removeprefix(prefix)) for word in words if word.startswith(prefix)]


def _architectures(known: set[int]) -> list[str]:
    if chosen := os.environ.get("FASTADV_CUDA_ARCHS"):
        words = re.split(r"[\s;,]+", chosen.strip())
        if not all(re.fullmatch(r"\d+(\.\d)?[af]?(\+PTX)?", word) for word in words):
            raise ToolchainError(f'FASTADV_CUDA_ARCHS={chosen!r} is not a list such as "80;90+PTX"')
        return [word.replace(".", "") for word in words]
    served = [number for number in ARCHITECTURES if number in known]
    if not served:
        raise ToolchainError(f"nvcc knows none of the architectures {', '.join(map(str, ARCHITECTURES))}")
    return [*(str(number) for number in served[:-1]), f"{served[-1]}+PTX"]
