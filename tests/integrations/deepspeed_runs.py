"""DeepSpeed's ZeRO in two CPU processes: in float32, its own, and in float64, which shows what is exact."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadv
from fastadv.integrations.accelerate import AccelerateOwner
from fastadv.integrations.deepspeed import DeepSpeedOwner
from tests.distributed.workers import FREEAT, METHODS, build, half, step
from tests.integrations.stacks import MICRO, RATE, STEPS
from tests.support import assert_gradients, batch

ALL = {
    **METHODS,
    "fgsm": (fastadv.FGSM, {"epsilon": 0.1}),
    "freeat": (fastadv.FreeAT, FREEAT),
    "awp": (fastadv.AWP, {}),
}
REFUSED = {"awp": "train with DDP", "llr": "ZeRO-1", "held-smart": "ZeRO-1"}  # the last two by ZeRO-3 alone
FLOAT64 = 1e-9
FLOAT32 = 1e-6  # of what training has moved: a float32 process is up to 5e-5 from a float64 one


@contextlib.contextmanager
def in_float64(wanted: bool) -> Iterator[None]:
    """DeepSpeed keeps copies of weights, and sends gradients, in float64; its own choices end with float32."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.base_optimizer import ZeROOptimizer
    from deepspeed.runtime.engine import DeepSpeedEngine

    with pytest.MonkeyPatch.context() as patch:
        if wanted:
            patch.setattr(DeepSpeedEngine, "get_data_types", lambda _: (torch.float64, torch.float64))
            patch.setattr(DeepSpeedEngine, "communication_data_type", torch.float64)
            patch.setattr(ZeROOptimizer, "_configure_master_weights", lambda *_, **__: torch.float64)
            patch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float32, torch.float64])
        yield


def configuration(stage: int, dtype: torch.dtype) -> dict[str, Any]:
    """Without what is not for the CPU; reduce_scatter takes no float64."""
    zero = {"stage": stage, "reduce_scatter": dtype is not torch.float64}
    return {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


def numbered(replays: int) -> Iterator[tuple[int, int]]:
    """The seed of each micro-batch, and its optimizer step: replays of a step's micro-batches follow each other."""
    for number in range(STEPS * replays):
        for micro in range(MICRO):
            yield number // replays * MICRO + micro, number


def alone(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """One process, no framework."""
    model = build().to(dtype)
    adv = make(name, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE / MICRO)  # the framework divides the sum of two losses
    if hasattr(adv, "attach"):
        adv.attach(optimizer)
    for seed, number in numbered(getattr(adv, "replays", 1)):
        step(adv, model, batch(seed=seed), number)
        if seed % MICRO == MICRO - 1:
            optimizer.step()
            optimizer.zero_grad()
    return {key: p.detach().double() for key, p in model.named_parameters()}


def make(name: str, model: nn.Module, **options: Any) -> Any:
    method, arguments = ALL[name]
    place = {} if name == "awp" else {"embedding": "word_embeddings"}
    return method(model, **place, **arguments, **options)


def by_engine(rank: int, name: str, stage: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A loop with `deepspeed.initialize` and `engine.step`."""
    import deepspeed

    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False)
    config = {
        **configuration(stage, dtype),
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 0.0,  # its default is 1
    }
    model = build().to(dtype)
    sgd = torch.optim.SGD(model.parameters(), lr=RATE)
    engine: Any = deepspeed.initialize(model=model, optimizer=sgd, config=config)[0]
    adv = make(name, engine, backward=DeepSpeedOwner(engine))
    teaches = hasattr(adv, "attach")
    if teaches:
        with pytest.raises(ValueError, match=r"after every engine.step\(\)"):
            adv.attach(sgd)
    for seed, number in numbered(getattr(adv, "replays", 1)):
        step(adv, engine, half(rank, seed), number)
        assert not engine._running_engine_backward
        assert engine.optimizer._backward_active_depth == 0
        assert "_backward_prologue_per_tensor" not in vars(engine)
        engine.step()
        if teaches and engine.was_step_applied():
            adv.update()
    return gathered(model)


def by_accelerate(rank: int, name: str, stage: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A loop with `accelerator.accumulate`, as for every other launcher."""
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    config = {
        **configuration(stage, dtype),
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICRO,
        "gradient_clipping": 0.0,
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    with pytest.raises(ValueError, match="make the owner after"):
        AccelerateOwner(accelerator)
    model = build().to(dtype)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    assert model.zero_optimization_stage() == stage
    adv = make(name, model, backward=AccelerateOwner(accelerator))
    if hasattr(adv, "attach"):
        adv.attach(optimizer)
    for seed, number in numbered(getattr(adv, "replays", 1)):
        with accelerator.accumulate(model):
            step(adv, model, half(rank, seed), number)
            optimizer.step()
            optimizer.zero_grad()
    assert model.global_steps == STEPS * getattr(adv, "replays", 1)
    return gathered(model.module)


LOOPS: dict[str, Callable[[int, str, int, torch.dtype], dict[str, Tensor]]] = {
    "engine": by_engine,
    "accelerate": by_accelerate,
}


def trained(rank: int, case: str, stage: int, loop: str) -> dict[str, Tensor]:
    """A case is a precision and a method's name; nothing where the method is refused."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    precision, name = case.split()
    dtype = getattr(torch, precision)
    with in_float64(dtype is torch.float64):
        if name == "awp" or (name in REFUSED and stage == 3):
            with pytest.raises(ValueError, match=REFUSED[name]):
                LOOPS[loop](rank, name, stage, dtype)
            return {}
        return LOOPS[loop](rank, name, stage, dtype)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {key: p.detach().double().clone() for key, p in model.named_parameters()}


def assert_near(
    got: dict[str, Tensor],
    want: dict[str, Tensor],
    start: dict[str, Tensor],
    dtype: torch.dtype,
    within: float | None = None,
) -> None:
    """What training moved: each parameter's by itself in float64, of the whole in float32, whose rounding grows."""
    moved = {key: value - start[key] for key, value in got.items()}
    tolerance, floor = (FLOAT64, 1e-2) if dtype is torch.float64 else (FLOAT32, 1.0)
    assert_gradients(moved, {key: value - start[key] for key, value in want.items()}, within or tolerance, floor)
