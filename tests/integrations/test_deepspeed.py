"""DeepSpeed's ZeRO, with its own loop and with accelerate's: two processes equal one, for every method or none."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.distributed.workers import build
from tests.integrations.deepspeed_runs import LOOPS, alone, assert_near, trained
from tests.integrations.stacks import together

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.dist, pytest.mark.slow]
PERTURBING = ["fgsm", "fgm-sample", "pgd-sample", "pgd-last", "freelb-sample", "freeat", "yopo-sample", "neftune"]
NAMES = [*PERTURBING, "smart", "vat", "llr", "held-smart", "awp"]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("loop", LOOPS)
def test_zero(loop: str, stage: int, tmp_path: Path) -> None:
    cases = [f"{precision} {name}" for precision in ("float64", "float32") for name in NAMES]
    found = together(functools.partial(trained, stage=stage, loop=loop), cases, tmp_path)
    for case, got in found.items():
        precision, name = case.split()
        dtype = getattr(torch, precision)
        start = {key: p.detach().to(dtype).double() for key, p in build().named_parameters()}
        if got:
            assert_near(got, alone(name, dtype), start, dtype)
    assert sum(not got for got in found.values()) == 2 * (1 if stage < 3 else 3)
