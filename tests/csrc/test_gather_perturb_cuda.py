"""The CUDA twin: compiled wherever nvcc is, run where a device is."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastadv import native
from fastadv.native.gather_perturb import check, gather_perturb

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def toolchain() -> ModuleType:
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "csrc" / "toolchain.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "arch",
    [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("op", ["gather_perturb", "gather_perturb_backward", "segment_sum"])
def test_compiles_without_spills(op: str, arch: int, tmp_path: Path) -> None:
    tools = toolchain()
    try:
        nvcc = tools.find_nvcc()
    except tools.ToolchainError as missing:
        pytest.skip(str(missing))
    if str(arch) not in [known.removesuffix("+PTX") for known in nvcc.architectures]:
        pytest.skip(f"nvcc {nvcc.version} does not know sm_{arch}")
    source = ROOT / "csrc" / f"{op}_cuda.cu"
    command = [nvcc.command, "-std=c++17", "-O3", "-DFASTADV_WITH_CUDA", "-Xptxas", "-v", "-cubin"]
    output = tools.run([*command, f"-arch=sm_{arch}", str(source), "-o", str(tmp_path / "op.cubin")])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", output)
    kernels = re.findall(rf"Compiling entry function '(\w*{op}_kernel\w*)'", output)
    assert len(kernels) == len(DTYPES), output
    assert len(spills) >= len(kernels), output
    assert set(spills) == {("0", "0")}, output


def test_a_cuda_tensor_without_cuda_ops_says_why() -> None:
    if native.cuda_reason() is None:
        pytest.skip("the CUDA ops are there")
    assert isinstance(native.cuda_reason(), str)
    assert native.cuda_reason()


needs_cuda = pytest.mark.skipif(native.cuda_reason() is not None, reason=f"no CUDA ops: {native.cuda_reason()}")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [1, 33, 768, 1025])
@pytest.mark.parametrize("form", ["plain", "delta", "slot"])
def test_agrees_with_the_cpu_bit_for_bit(dtype: torch.dtype, dim: int, form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    added = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.randn(101, dim, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(101, (5, 37), generator=generator)
    slot = torch.randint(9, (5, 37), generator=generator) if form == "slot" else None
    leading = (9,) if form == "slot" else (5, 37)
    delta = torch.randn(*leading, dim, generator=generator, dtype=added) if form != "plain" else None
    want = gather_perturb(weight, ids, delta, slot)
    with torch.cuda.stream(torch.cuda.Stream()):
        on_device = [None if t is None else t.cuda() for t in (weight, ids, delta, slot)]
        got = gather_perturb(*on_device)  # type: ignore[arg-type]
        torch.cuda.current_stream().synchronize()
    assert torch.equal(got.cpu(), want)
    check(got.device)


@pytest.mark.gpu
@needs_cuda
def test_an_id_out_of_range_is_masked_and_marked() -> None:
    weight, ids = torch.ones(5, 3, device="cuda"), torch.tensor([0, 99, -1, 4], device="cuda")
    got = gather_perturb(weight, ids, None, None)
    assert torch.equal(got.cpu(), torch.tensor([1.0, 0.0, 0.0, 1.0]).view(4, 1).expand(4, 3))
    with pytest.raises(IndexError, match="out of range on cuda"):
        check(weight.device)
    check(weight.device)


@pytest.mark.gpu
@needs_cuda
def test_empty_on_cuda() -> None:
    weight, ids = torch.ones(5, 3, device="cuda"), torch.zeros(2, 0, dtype=torch.int64, device="cuda")
    assert gather_perturb(weight, ids, None, None).shape == (2, 0, 3)
