"""List the backends that are available here, and why others are not (`python -m fastadv`, `fastadv info`)."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import torch

import fastadv
from fastadv import native
from fastadv.ops import dispatch


def report() -> str:
    """Lay out the versions, the outcome of the build, and every op's backends."""
    tables = [aligned(table) for table in (versions(), built(), backends())]
    return "\n\n".join([f"fastadv {fastadv.__version__}", *tables])


def versions() -> list[tuple[str, str]]:
    """List Python, torch, triton and the devices that torch sees."""
    if torch.cuda.is_available():
        devices = ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    else:
        devices = "none that torch sees"
    return [
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("triton", _installed("triton")),
        ("transformers", _installed("transformers")),
        ("GPU", devices),
        ("threads", str(torch.get_num_threads())),
    ]


def built() -> list[tuple[str, str]]:
    """List what the build of the C++ part found, and why something is missing."""
    info = native.build_info()
    openmp = info.get("openmp_reason") or ("yes" if info.get("compiler") else "not built")
    archs = ", ".join(info.get("cuda_architectures", ())) or "none"
    nvcc = f"{info['nvcc']} ({info['cuda_version']})" if "nvcc" in info else "not used"
    return [
        ("C++ ops", native.reason() or "yes"),
        ("compiler", info.get("compiler", "none")),
        ("OpenMP", openmp),
        ("CUDA ops", native.cuda_reason() or "yes"),
        ("nvcc", nvcc),
        ("CUDA architectures", archs),
    ]


def backends() -> list[tuple[str, ...]]:
    """List what runs each op on the CPU and on CUDA, and why it is nothing faster."""
    rows: list[tuple[str, ...]] = [("op", "cpu", "cuda", "why eager")]
    for op in dispatch.OPS:
        here = {status.device: status for status in op.status()}
        cells = [here[device].backend if here[device].available else "eager" for device in ("cpu", "cuda")]
        reasons = [f"{row.device}: {row.reason}" for row in here.values() if not row.available]
        rows.append((op.name, *cells, "; ".join(reasons)))
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out in columns, each as wide as its longest entry."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
