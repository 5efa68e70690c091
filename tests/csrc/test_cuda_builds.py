"""The CUDA files, compiled wherever nvcc is: nothing may spill, and what is 16 bytes long is one access."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastadv import native
from fastadv.native import toolchain

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"rows": 4 * 4 + 4, "grads": 1}  # a step's four kernels for four dtypes, and copies of four word lengths
SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100)]


def test_every_cuda_file_is_here() -> None:
    assert {path.name for path in (ROOT / "csrc").glob("*.cu")} == {f"{op}_cuda.cu" for op in KERNELS}


@pytest.fixture(scope="module")
def cubins(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[str, Path]]:
    """What ptxas says of a file, and its machine code."""

    @functools.cache
    def compiled(op: str, arch: int) -> tuple[str, Path]:
        nvcc = toolchain.find_nvcc()
        if str(arch) not in [known.removesuffix("+PTX") for known in nvcc.architectures]:
            pytest.skip(f"nvcc {nvcc.version} does not know sm_{arch}")
        command = [nvcc.command, "-std=c++17", "-O3", "-DFASTADV_WITH_CUDA", "-Xptxas", "-v", "-Werror", "all-warnings"]
        source, cubin = ROOT / "csrc" / f"{op}_cuda.cu", tmp_path_factory.mktemp("cuda") / "op.cubin"
        return toolchain.run([*command, "-cubin", f"-arch=sm_{arch}", str(source), "-o", str(cubin)]), cubin

    try:
        toolchain.find_nvcc()
    except toolchain.ToolchainError as missing:
        pytest.skip(str(missing))
    return compiled


@pytest.mark.parametrize("arch", [90, *SLOW])
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spills(op: str, arch: int, cubins: Callable[[str, int], tuple[str, Path]]) -> None:
    output, _ = cubins(op, arch)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    kernels = re.findall(r"Compiling entry function '(\w*_kernel\w*)'", output)
    assert len(kernels) == KERNELS[op], output
    assert len(spills) >= len(kernels), output
    assert set(spills) == {("0", "0", "0")}, output


@pytest.mark.parametrize("arch", [90, *SLOW])
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_to_accesses_of_16_bytes(op: str, arch: int, cubins: Callable[[str, int], tuple[str, Path]]) -> None:
    """Every kernel that reads rows or gradients, but copies of rows whose length or place is no multiple of that."""
    _, cubin = cubins(op, arch)
    listing = toolchain.run([cuobjdump(), "-sass", str(cubin)])
    found = re.findall(r"Function : (\w+)(.*?)(?=Function :|\Z)", listing, re.DOTALL)
    assert len(found) == KERNELS[op]
    wide = {name: code for name, code in found if not re.search(r"copy_kernelI[lis]", name)}
    assert len(wide) == len(found) - (3 if op == "rows" else 0)
    for name, code in wide.items():
        assert re.search(r"\bLDG?\.E\.[\w.]*128", code), name
        assert re.search(r"\bSTG?\.E\.[\w.]*128", code) or "sums_kernel" in name or "size_kernel" in name, name


def cuobjdump() -> str:
    """The one beside nvcc, or the one that comes with triton."""
    folders = [str(Path(toolchain.find_nvcc().command).resolve().parent), os.environ.get("PATH", "")]
    with contextlib.suppress(ImportError):
        import triton

        folders.append(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump", path=os.pathsep.join(folders))
    return found or pytest.skip("no cuobjdump")


def test_a_cuda_tensor_without_cuda_ops_says_why() -> None:
    if native.cuda_reason() is None:
        pytest.skip("the CUDA ops are there")
    assert isinstance(native.cuda_reason(), str)
    assert native.cuda_reason()
