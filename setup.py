"""Builds `fastadv._C` from csrc/. Needs no torch, probes compilers and never the GPU, and degrades with a reason.

Environment:
    FASTADV_NATIVE      auto (default), 1: fail unless the C++ part builds, 0: pure Python
    FASTADV_CUDA        auto (default), 1: fail unless the CUDA part builds, 0: C++ only
    FASTADV_CUDA_ARCHS  for example "80;90+PTX"; default: what nvcc knows of 75, 80, 86, 89, 90, 100, 120
    FASTADV_MARCH       for example "native"; default: a portable binary
    CXX, CXXFLAGS, LDFLAGS, CUDA_HOME, CUDA_PATH
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPP, CU, HEADERS = (
    sorted(found.relative_to(ROOT).as_posix() for found in (ROOT / "csrc").glob(pattern))
    for pattern in ("*.cpp", "*.cu", "*.h")
)
TOOLCHAIN = "fastadv/native/toolchain.py"
RECORD = "_build_info.json"


def load(path: str) -> Any:
    """A module of the package without the package, which imports torch."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is not there")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load(TOOLCHAIN)
ToolchainError: type[Exception] = toolchain.ToolchainError


def wish(name: str) -> str:
    """The value of a tri-state variable."""
    value = os.environ.get(name, "auto")
    if value not in {"auto", "0", "1"}:
        raise SystemExit(f"{name}={value!r} must be auto, 0 or 1")
    return value


class BuildNative(build_ext):
    """Compiles csrc/ if it can; what it cannot do, it records for `python -m fastadv`."""

    def build_extension(self, ext: Extension) -> None:
        target = (Path(self.build_lib) / self.get_ext_filename(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # an earlier build must not pass for this one
        info: dict[str, Any] = {"python": sys.version.split()[0], "native_reason": None, "cuda_reason": None}
        try:
            if wish("FASTADV_NATIVE") == "0":
                raise ToolchainError("FASTADV_NATIVE=0 when it was built")
            self._build(target, info)
        except ToolchainError as missing:
            if wish("FASTADV_NATIVE") == "1" or wish("FASTADV_CUDA") == "1":
                raise SystemExit(f"fastadv: {missing}") from missing
            info["native_reason"] = str(missing)
            warnings.warn(f"fastadv: installed without its C++ ops: {missing}", stacklevel=1)
        (target.parent / RECORD).write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")

    def _build(self, target: Path, info: dict[str, Any]) -> None:
        cxx = toolchain.find_cxx()
        info.update(compiler=cxx.version, openmp_reason=cxx.openmp_reason)
        try:
            if wish("FASTADV_CUDA") == "0":
                raise ToolchainError("FASTADV_CUDA=0 when it was built")
            nvcc = toolchain.find_nvcc()
            self._compile(target, cxx, nvcc)
            info.update(nvcc=nvcc.command, cuda_version=nvcc.version, cuda_architectures=nvcc.architectures)
        except ToolchainError as missing:
            if wish("FASTADV_CUDA") == "1":
                raise
            if wish("FASTADV_CUDA") == "auto" and "no nvcc" not in str(missing):
                warnings.warn(f"fastadv: built without CUDA: {missing}", stacklevel=1)
            info["cuda_reason"] = str(missing)
            self._compile(target, cxx, None)

    def _compile(self, target: Path, cxx: Any, nvcc: Any) -> None:
        """Writes the rules once; ninja runs them in parallel and skips what is up to date."""
        folder = Path(self.build_temp).resolve() / ("cuda" if nvcc else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        steps, objects = [], []
        for source in CPP + (CU if nvcc else []):
            output = folder / (Path(source).name + ".o")
            objects.append(str(output))
            steps.append((output, source, self._compile_command(source, output, cxx, nvcc)))
        libraries = nvcc.link_flags() if nvcc else []
        link = [*cxx.command, *objects, *cxx.link_flags(), *libraries, "-o", str(target)]
        if ninja := find_ninja():
            (folder / "build.ninja").write_text(ninja_rules(steps, objects, target, link), encoding="utf-8")
            toolchain.run([ninja, "-C", str(folder)])
            return
        for _, _, command in steps:
            toolchain.run(command)
        toolchain.run(link)

    def _compile_command(self, source: str, output: Path, cxx: Any, nvcc: Any) -> list[str]:
        if nvcc and source in CU:
            command = [nvcc.command, *nvcc.compile_flags()]
        else:
            command = [*cxx.command, *cxx.compile_flags(), *includes(source, nvcc)]
        if nvcc:
            command.append("-DFASTADV_WITH_CUDA")
        return [*command, "-MD", "-MF", f"{output}.d", "-c", str(ROOT / source), "-o", str(output)]

    def copy_extensions_to_source(self) -> None:
        """An editable install takes from the tree what was built, and nothing older."""
        for built, kept in self._places().items():
            Path(kept).unlink(missing_ok=True)
            if Path(built).exists():
                self.copy_file(built, kept, level=self.verbose)

    def get_outputs(self) -> list[str]:
        """What a wheel takes along: a library that could not be built is not missed."""
        return [built for built in self._places() if Path(built).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        """For editable installs: where a wheel would have it, and where it is in the tree."""
        return {built: kept for built, kept in self._places().items() if self.inplace and Path(kept).exists()}

    def _places(self) -> dict[str, str]:
        library = self.get_ext_filename("fastadv._C")
        return {str(Path(self.build_lib) / name): name for name in (library, f"fastadv/{RECORD}")}


def includes(source: str, nvcc: Any) -> list[str]:
    """Headers for one C++ file. Only the module sees Python's, which move with every isolated build."""
    if not source.endswith("module.cpp"):
        return []
    import pybind11

    paths = [pybind11.get_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    return [f"-isystem{path}" for path in [*dict.fromkeys(paths), *(nvcc.includes if nvcc else [])]]


def find_ninja() -> str | None:
    """The ninja that the `ninja` package brings, if it is importable."""
    try:
        import ninja
    except ImportError:
        return None
    return str(Path(ninja.BIN_DIR) / "ninja")


def ninja_rules(steps: list[tuple[Path, str, list[str]]], objects: list[str], target: Path, link: list[str]) -> str:
    """One rule per command, with the compiler's own list of headers."""
    lines = ["ninja_required_version = 1.5"]
    for number, (output, source, command) in enumerate(steps):
        lines += [
            f"rule compile{number}",
            f"  command = {escape(shlex.join(command))}",
            f"  depfile = {escape(str(output))}.d",
            "  deps = gcc",
            f"build {path(output)}: compile{number} {path(ROOT / source)}",
        ]
    lines += ["rule link", f"  command = {escape(shlex.join(link))}"]
    lines += [f"build {path(target)}: link {' '.join(path(item) for item in objects)}", ""]
    return "\n".join(lines)


def escape(text: str) -> str:
    """Text as ninja wants it in a value."""
    return text.replace("$", "$$")


def path(name: str | Path) -> str:
    """A path as ninja wants it in a build line."""
    return escape(str(name)).replace(" ", "$ ").replace(":", "$:")


setup(
    # kernels/ is mapped: a top-level package of that name would collide with a well-known one.
    packages=[*find_packages(include=["fastadv", "fastadv.*"]), "fastadv.kernels"],
    package_dir={"fastadv": "fastadv", "fastadv.kernels": "kernels"},
    package_data={"fastadv": ["py.typed"]},
    include_package_data=False,
    ext_modules=[Extension("fastadv._C", sources=[*CPP, *CU], depends=[*HEADERS, TOOLCHAIN])],
    cmdclass={"build_ext": BuildNative},
)
