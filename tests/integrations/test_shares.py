"""Terms of batches that have different numbers of tokens, on two processes, against one that has all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastadv
from tests.distributed.workers import MARKS, WORLD
from tests.integrations.by_hand import llama, samples, train
from tests.integrations.stacks import together
from tests.integrations.test_fused_head import METHODS
from tests.support import assert_gradients

pytestmark = MARKS
NAMES = ["smart", "vat", "bregman"]
LOOPS = [f"{name}-{how}" for name in NAMES for how in ("mean", "sum")]


def moved(model: nn.Module) -> dict[str, Tensor]:
    start = llama().double().state_dict()
    return {name: tensor.detach() - start[name] for name, tensor in model.named_parameters()}


def trained(name: str, folder: str = "unused", **options: Any) -> dict[str, Tensor]:
    model = llama().double()
    train(model, Path(folder), samples(16, language=True), adversary=METHODS[name], **options)
    return moved(model)


def trainers(rank: int, name: str) -> dict[str, Tensor]:
    return trained(name, ddp_backend="gloo", gradient_accumulation_steps=2)


def loop(rank: int, case: str) -> dict[str, Tensor]:
    """One step on two rows of four, gradients averaged by DDP, or summed by hand as torchtitan does."""
    name, how = case.split("-")
    return stepped(name, rank, how)


def stepped(name: str, rank: int | None, how: str = "sum") -> dict[str, Tensor]:
    model, rows = llama().double(), samples(4, language=True)
    whole = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    mine = whole if rank is None else {key: value[2 * rank : 2 * rank + 2] for key, value in whole.items()}
    run = DistributedDataParallel(model) if how == "mean" else model
    adv = adversary(name, run)
    tokens, positions = (whole["labels"][:, 1:] != -100).sum(), whole["attention_mask"].sum()
    times = WORLD if how == "mean" else 1

    def closure() -> tuple[Tensor, Tensor]:
        logits = run(input_ids=mine["input_ids"], attention_mask=mine["attention_mask"]).logits
        shifted = logits[:, :-1].flatten(0, 1), mine["labels"][:, 1:].flatten()
        return times * F.cross_entropy(*shifted, ignore_index=-100, reduction="sum") / tokens, logits

    adv.share = times * mine["attention_mask"].sum() / positions
    adv.backward(closure, mask=mine["attention_mask"])
    if rank is not None and how == "sum":
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
    return {key: parameter.grad for key, parameter in model.named_parameters()}


def adversary(name: str, model: Any) -> fastadv.Method:
    made = METHODS[name]
    adv = made[0](model, **made[1]) if isinstance(made, tuple) else made(model)
    for tensor in getattr(adv, "teacher", {}).values():
        tensor.mul_(0.9)
    return adv


def loops(rank: int, case: str) -> dict[str, Tensor]:
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return loop(rank, case)


def test_shares_by_the_formula(tmp_path: Path) -> None:
    for case, found in together(loops, LOOPS, tmp_path).items():
        assert_gradients(found, stepped(case.split("-")[0], None), 1e-6)  # a Llama's norms are float32


@pytest.mark.slow
def test_the_trainer_sets_shares(tmp_path: Path) -> None:
    found = together(trainers, NAMES, tmp_path)
    for name in NAMES:
        assert_gradients(found[name], trained(name, str(tmp_path), per_device_train_batch_size=8), 1e-6)
