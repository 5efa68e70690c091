"""accelerate's `accumulate` and its wrappers, in two processes against one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadv.integrations.accelerate import AccelerateOwner
from tests.distributed.workers import MARKS, build, half, step
from tests.integrations.stacks import MICRO, NAMES, RATE, assert_as_alone, make, micro_batches, together, weights

pytestmark = MARKS


def trained(rank: int, name: str, **options: Any) -> dict[str, Tensor]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=MICRO, **options)
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    adv = make(name, model, backward=AccelerateOwner(accelerator))
    if name == "vat":
        adv.share = 1 / MICRO  # as in a loop of one's own: accelerate's division is not done twice
    if hasattr(adv, "attach"):
        adv.attach(optimizer.optimizer)
    for seed, _, _ in micro_batches():
        with accelerator.accumulate(model):
            step(adv, model, half(rank, seed))
            optimizer.step()
            optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model))


def sharded(rank: int, name: str) -> dict[str, Tensor]:
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", reshard_after_forward=True)
    return trained(rank, name, fsdp_plugin=plugin)


def test_accumulate_under_ddp(tmp_path: Path) -> None:
    assert_as_alone(together(trained, NAMES, tmp_path))


@pytest.mark.slow
def test_accumulate_under_fsdp2(tmp_path: Path) -> None:
    names = ["pgd-sample", "smart"]
    assert_as_alone(together(sharded, names, tmp_path))


@pytest.mark.parametrize(("kind", "message"), [("DEEPSPEED", "make the owner after"), ("MEGATRON_LM", "not supported")])
def test_what_accelerate_cannot_hand_over(kind: str, message: str) -> None:
    """DeepSpeed's engine is there when a model has been prepared."""
    from accelerate.utils import DistributedType

    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], scaler=None, deepspeed_engine_wrapped=None)
    with pytest.raises(ValueError, match=message):
        AccelerateOwner(accelerator)
