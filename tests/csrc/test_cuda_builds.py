"""The CUDA files, compiled wherever nvcc is: nothing may spill."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastadv import native
from fastadv.native import toolchain

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {"rows": 4 * 4 + 4, "grads": 1}  # a step's four kernels for four dtypes, and copies of four word lengths
SLOW = [pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100)]


def test_every_cuda_file_is_here() -> None:
    assert {path.name for path in (ROOT / "csrc").glob("*.cu")} == {f"{op}_cuda.cu" for op in KERNELS}


@pytest.mark.parametrize("arch", [90, *SLOW])
@pytest.mark.parametrize("op", KERNELS)
def test_compiles_without_spills(op: str, arch: int, tmp_path: Path) -> None:
    try:
        nvcc = toolchain.find_nvcc()
    except toolchain.ToolchainError as missing:
        pytest.skip(str(missing))
    if str(arch) not in [known.removesuffix("+PTX") for known in nvcc.architectures]:
        pytest.skip(f"nvcc {nvcc.version} does not know sm_{arch}")
    command = [nvcc.command, "-std=c++17", "-O3", "-DFASTADV_WITH_CUDA", "-Xptxas", "-v", "-Werror", "all-warnings"]
    source = ROOT / "csrc" / f"{op}_cuda.cu"
    output = toolchain.run([*command, "-cubin", f"-arch=sm_{arch}", str(source), "-o", str(tmp_path / "op.cubin")])
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", output)
    kernels = re.findall(r"Compiling entry function '(\w*_kernel\w*)'", output)
    assert len(kernels) == KERNELS[op], output
    assert len(spills) >= len(kernels), output
    assert set(spills) == {("0", "0", "0")}, output


def test_a_cuda_tensor_without_cuda_ops_says_why() -> None:
    if native.cuda_reason() is None:
        pytest.skip("the CUDA ops are there")
    assert isinstance(native.cuda_reason(), str)
    assert native.cuda_reason()
