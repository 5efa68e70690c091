"""DeepSpeed's ZeRO on the CPU, in two processes against one. DeepSpeed trains in float32."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv.integrations.deepspeed import DeepSpeedOwner
from tests.distributed.workers import build, half, step
from tests.integrations.stacks import MICRO, RATE, assert_as_alone, make, micro_batches, together

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.dist, pytest.mark.slow]
NAMES = ["fgm-sample", "pgd-sample", "freelb-sample", "yopo-sample", "neftune", "smart", "vat"]


def trained(rank: int, name: str, stage: int) -> dict[str, Tensor]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # its default is 1
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = build().float()
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    engine: Any = deepspeed.initialize(model=model, optimizer=sgd, config=config)[0]
    adv = make(name, engine, backward=DeepSpeedOwner(engine))
    for seed, _, _ in micro_batches():
        step(adv, engine, half(rank, seed))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        found = {key: p.detach().double() for key, p in model.named_parameters()}
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero(stage: int, tmp_path: Path) -> None:
    found = together(functools.partial(trained, stage=stage), NAMES, tmp_path)
    assert_as_alone({"vat": found.pop("vat")}, 1e-3, floor=1e-2)  # its xi is float32's
    assert_as_alone(found, 5e-5, floor=1e-2)
