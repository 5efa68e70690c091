"""The built library: which libraries and symbols it needs, and which it shows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from fastadv import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=f"no C++ ops: {native.reason()}"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files"),
]

SYSTEM = {"linux-vdso", "ld-linux", "libstdc++", "libgcc_s", "libgomp"}
SYSTEM |= {"libc", "libm", "libdl", "librt", "libpthread"}
SANITIZERS = {"libasan", "libubsan"}  # `make asan`


def output_of(tool: str, *arguments: str) -> str:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    library = native.extension().__file__
    return subprocess.run([tool, *arguments, library], check=True, text=True, capture_output=True).stdout


def test_needs_system_libraries_alone() -> None:
    names = re.findall(r"^\s*(\S+)", output_of("ldd"), re.MULTILINE)
    needed = {re.split(r"\.so|-x86-64|-aarch64", name.rpartition("/")[2])[0] for name in names}
    assert "libc" in needed
    assert needed <= SYSTEM | SANITIZERS, needed - SYSTEM


def test_asks_nobody_for_torch_or_cuda() -> None:
    symbols = output_of("nm", "-D", "--undefined-only", "--demangle")
    assert "PyModule" in symbols
    assert not re.findall(r"^.*(?:torch|c10|\bat::|cuda|\bcu[A-Z]).*$", symbols, re.MULTILINE)


def test_shows_nothing_but_its_entry() -> None:
    lines = output_of("nm", "-D", "--defined-only").splitlines()
    strong = [line.split()[-1] for line in lines if line.split()[-2] in "TDB"]
    assert strong == ["PyInit__C"]
    shown = "\n".join(line.split()[-1] for line in lines)
    assert not re.search(r"cuda|fastadv|pybind11L", shown)
