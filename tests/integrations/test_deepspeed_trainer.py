"""The Trainer with DeepSpeed: two processes equal one, and go on from a checkpoint as if nothing had been."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fastadv
from fastadv.integrations.deepspeed import DeepSpeedOwner
from fastadv.integrations.transformers import AdversarialTrainer
from tests.distributed.workers import FREEAT, LB, PGD, held, waves
from tests.integrations.by_hand import Classifier, arguments, bert, llama, samples
from tests.integrations.deepspeed_runs import assert_near, configuration, gathered, in_float64
from tests.integrations.stacks import together

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.dist, pytest.mark.slow]
VAT = (fastadv.VAT, {"epsilon": 0.5, "steps": 2, "random_start": waves, "start_step": 1})
ADVERSARIES: dict[str, Any] = {
    "fgm": (fastadv.FGM, {"epsilon": 0.7, "scope": "sample"}),
    "pgd": (fastadv.PGD, {**PGD, "scope": "sample", "start_step": 1}),
    "freelb": (fastadv.FreeLB, LB),
    "smart": (fastadv.SMART, {"epsilon": 0.1, "steps": 2, "random_start": waves}),
    "vat": VAT,
    "unlabelled": VAT,
    "llr": (fastadv.LLR, {"epsilon": 0.1, "steps": 2, "random_start": waves}),
    "held": functools.partial(held, epsilon=0.1, random_start=waves),
    "freeat": (fastadv.FreeAT, FREEAT),
    "clipped": (fastadv.FGM, {"epsilon": 0.7, "scope": "sample"}),
    "language": (fastadv.PGD, {**PGD, "scope": "sample"}),
}
SHARDED = [name for name in ADVERSARIES if name not in ("llr", "held")]  # whatever ZeRO-3 has of weights
IN_FLOAT32 = ["fgm", "pgd", "freelb", "smart"]
WITHIN = {
    "float64 clipped": 1e-6,  # DeepSpeed finds the norm of gradients in float32
    "float32 smart": 3e-6,  # its term is a difference of logits: a float32 process is 2.2e-6 from a float64 one
}


class Telling(Classifier):
    """Says each sample's loss, which LLR linearises."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        return {**output, "losses": F.cross_entropy(output.logits, labels, reduction="none")}


def model_of(name: str) -> nn.Module:
    model: nn.Module = llama() if name == "language" else bert()
    if name == "llr":
        model.__class__ = Telling
    return model


def trainer_of(name: str, folder: Path, dtype: torch.dtype, stage: int = 0, **changes: Any) -> AdversarialTrainer:
    """Ten batches of the union, or of a process's half each: the last optimizer step has one micro-batch."""
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2 if stage else 4, **changes}
    if name == "clipped":
        options["max_grad_norm"] = 1.0
    if stage:
        auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
        half = {"bf16": {"enabled": True}} if options.get("bf16") else {}
        options["deepspeed"] = {**configuration(stage, dtype), **dict.fromkeys(auto, "auto"), **half}
    return AdversarialTrainer(
        model=model_of(name).to(dtype),
        args=arguments(folder, **options),
        train_dataset=samples(20, language=name == "language"),
        adversary=ADVERSARIES[name],
        unlabelled=samples(30)[9:] if name == "unlabelled" else None,
    )


def alone(name: str, folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    trainer = trainer_of(name, folder, dtype)
    trainer.train()
    return {key: p.detach().double() for key, p in trainer.model.named_parameters()}


def run(trainer: AdversarialTrainer, stage: int, checkpoint: Any = None) -> dict[str, Tensor]:
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.model_wrapped.zero_optimization_stage() == stage
    assert trainer.model_wrapped.global_steps == trainer.state.global_step
    return gathered(trainer.model)


def trained(rank: int, case: str, stage: int, folder: Path) -> dict[str, Tensor]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    precision, name = case.split()
    dtype = getattr(torch, precision)
    with in_float64(dtype is torch.float64):
        return run(trainer_of(name, folder, dtype, stage), stage)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_as_one_process(stage: int, tmp_path: Path) -> None:
    names = SHARDED if stage == 3 else list(ADVERSARIES)
    cases = [*(f"float64 {name}" for name in names), *(f"float32 {name}" for name in IN_FLOAT32)]
    for case, got in together(functools.partial(trained, stage=stage, folder=tmp_path), cases, tmp_path).items():
        precision, name = case.split()
        dtype = getattr(torch, precision)
        start = {key: p.detach().double() for key, p in model_of(name).named_parameters()}
        assert_near(got, alone(name, tmp_path, dtype), start, dtype, WITHIN.get(case))


def resumed(rank: int, name: str, stage: int, folder: Path) -> dict[str, Tensor]:
    """Trained to the end, and trained on from the first checkpoint: the same bits, of the weights and of the method."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    changes = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear", "num_train_epochs": 2}
    first, again = folder / f"{name}-{stage}", folder / f"{name}-{stage}-again"
    whole = trainer_of(name, first, torch.float32, stage, **changes)
    want = run(whole, stage)
    assert whole.state.global_step > 2
    if rank == 0:
        shutil.copytree(first / "checkpoint-2", again / "checkpoint-2")
        damage(whole, first / "checkpoint-2", again / "checkpoint-3")
    dist.barrier()
    trainer = trainer_of(name, again, torch.float32, stage, **changes)
    got = run(trainer, stage, checkpoint=True)
    assert trainer.resumed == again / "checkpoint-2"
    mine, theirs = trainer.adversary.state_dict(), whole.adversary.state_dict()
    assert all(torch.equal(mine[key], tensor) for key, tensor in theirs.items())
    assert len(theirs) > 3 or name == "smart", "the method has a state"
    return {key: value - got[key] for key, value in want.items()}


def damage(trainer: AdversarialTrainer, checkpoint: Path, other: Path) -> None:
    """What DeepSpeed writes is looked at too; the last damage stays, and is passed over."""
    assert trainer.flaw(checkpoint) is None
    for harm, flaw in ((cut, "cut off"), (without_optimizer, "optimizer is missing"), (without_latest, "latest")):
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(checkpoint, other)
        harm(other)
        assert flaw in str(trainer.flaw(other))


def cut(checkpoint: Path) -> None:
    file = next(checkpoint.glob("global_step2/*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-100])


def without_optimizer(checkpoint: Path) -> None:
    for file in checkpoint.glob("global_step2/*optim_states.pt"):
        file.unlink()


def without_latest(checkpoint: Path) -> None:
    (checkpoint / "latest").unlink()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resumed_in_the_midst(stage: int, tmp_path: Path) -> None:
    names = ["freeat", "smart" if stage == 3 else "held"]
    found = together(functools.partial(resumed, stage=stage, folder=tmp_path), names, tmp_path)
    assert all(not difference.any() for name in names for difference in found[name].values())


def halved(rank: int, name: str, stage: int, folder: Path) -> dict[str, Tensor]:
    """The figures of the first log, with weights in bfloat16."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    trainer = trainer_of(name, folder, torch.float32, stage, bf16=True)
    run(trainer, stage)
    return figures(trainer)


def figures(trainer: AdversarialTrainer) -> dict[str, Tensor]:
    log = trainer.state.log_history[0]
    return {key: torch.tensor(log[key]) for key in ("loss", "grad_norm", "adv_loss")}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16(stage: int, tmp_path: Path) -> None:
    """bfloat16 has 8 bits. Of the terms of SMART and VAT, small differences of logits, it leaves less."""
    names = ["fgm", "freelb", "freeat"]
    found = together(functools.partial(halved, stage=stage, folder=tmp_path), names, tmp_path)
    for name in names:
        trainer = trainer_of(name, tmp_path, torch.float32)
        trainer.train()
        for key, figure in figures(trainer).items():
            assert float(found[name][key]) == pytest.approx(float(figure), rel=0.02), (name, key)


def refused(rank: int, name: str, folder: Path) -> dict[str, Tensor]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    trainer = trainer_of("fgm", folder, torch.float32, 2)
    trainer._make_adversary = lambda model: fastadv.FGM(model, epsilon=0.7, backward=DeepSpeedOwner(model))
    with pytest.raises(ValueError, match="leave backward= out"):
        trainer.train()
    return {}


def test_an_owner_that_would_not_step(tmp_path: Path) -> None:
    together(functools.partial(refused, folder=tmp_path), ["own"], tmp_path)
