"""Zeros from the system's own pages are zeros like any others."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch

from fastadv.engine.model.lazy_zeros import LEAST, zeros_like

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0, 64, LEAST // 2 + 64])
def test_zeros(dtype: torch.dtype, size: int) -> None:
    like = torch.ones(size // 64, 64, dtype=dtype)
    zeros = zeros_like(like)
    assert zeros.dtype == dtype and zeros.shape == like.shape and zeros.is_contiguous()
    assert not zeros.any()
    zeros += 1
    assert torch.equal(zeros, like)
    assert not zeros_like(like).any()


def test_copies_and_pickles() -> None:
    zeros = zeros_like(torch.empty(LEAST // 4 + 1))
    zeros[3] = 1
    assert torch.equal(copy.deepcopy(zeros), zeros)
    assert torch.equal(pickle.loads(pickle.dumps(zeros)), zeros)


def test_the_memory_comes_with_writes_and_goes_with_the_tensor() -> None:
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs Linux: /proc/self/statm tells resident memory")

    def resident() -> int:
        return int(status.read_text(encoding="ascii").split()[1]) * 4096

    size = 1 << 28
    before = resident()
    zeros = zeros_like(torch.empty(size // 4))
    zeros[::1024] = 0  # one write to each page
    assert resident() - before > size // 2
    del zeros
    assert resident() - before < size // 2
    zeros = zeros_like(torch.empty(size // 4))
    zeros[0] = 1
    assert resident() - before < size // 2
