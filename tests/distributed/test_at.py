"""`adv.at(mask)` under DDP: two gloo processes with half of the batch each, against one in float64."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastadv
from tests.distributed import workers
from tests.models import TinyModel
from tests.support import assert_gradients, batch, gradients, seeded

pytestmark = workers.MARKS


def steps(model: nn.Module, plain: TinyModel, rows: slice) -> dict[str, Tensor]:
    """Two steps of one, two and three forwards: what uses `at` is known from the second step on."""
    data = {key: value[rows] for key, value in batch().items()}
    short = {key: value[rows] for key, value in batch(4, 5).items()}
    first, second = data["attention_mask"].bool().clone(), torch.zeros_like(short["attention_mask"], dtype=torch.bool)
    first[:, 3:], second[:, 2:] = False, True
    radii: dict[str, Any] = {"epsilon": 0.5, "step_size": 0.3, "steps": 2, "scope": "sample"}
    adv = fastadv.PGD(model, embedding=["word_embeddings", "ff1"], clean_weight=0, **radii)

    def attack() -> Tensor:
        with adv.at(second):
            return model(**short).loss

    def closure() -> Tensor:
        loss = model(**data).loss
        with adv.at(first):
            loss = loss + model(**data).loss
        with adv.at(second):
            return loss - 0.5 * model(**short).loss

    for _ in range(2):
        plain.zero_grad()
        adv.backward(closure, attack=attack)
    return gradients(plain)


def under_ddp(rank: int) -> dict[str, Tensor]:
    plain = seeded(lambda: TinyModel("tfm"))
    return steps(DistributedDataParallel(plain), plain, slice(2 * rank, 2 * rank + 2))


def under_fsdp2(rank: int) -> dict[str, Tensor]:
    plain = seeded(lambda: TinyModel("tfm"))
    fully_shard(plain.bert)
    fully_shard(plain)
    found = steps(plain, plain, slice(2 * rank, 2 * rank + 2))
    assert found
    return {name: p.grad.full_tensor() for name, p in plain.named_parameters()}


def fails_on_one(rank: int) -> list[str]:
    """A block that cannot be, on one rank: the step is void on both."""
    plain = seeded(lambda: TinyModel("tfm"))
    model, data = DistributedDataParallel(plain), batch()
    adv = fastadv.PGD(model, embedding="word_embeddings", scope="sample", clean_weight=0)
    mask = data["attention_mask"][: 3 if rank == 1 else 4]

    def closure() -> Tensor:
        with adv.at(mask):
            return model(**data).loss

    try:
        adv.backward(closure)
    except (ValueError, RuntimeError) as error:
        return [type(error).__name__, str(all(p.grad is None for p in plain.parameters()))]
    return ["no error"]


CASES: dict[str, Any] = {"ddp": (under_ddp, ()), "fsdp2": (under_fsdp2, ()), "fails": (fails_on_one, ())}


def run(rank: int, suite: str, folder: str) -> None:
    """All cases, in one of the processes."""
    del suite
    workers.run_cases(rank, CASES, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return functools.partial(workers.start, run)("all", tmp_path_factory.mktemp("at"))


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_two_processes(case: str, folder: Path) -> None:
    halves = []
    for rank in range(2):
        plain = seeded(lambda: TinyModel("tfm"))
        halves.append(steps(plain, plain, slice(2 * rank, 2 * rank + 2)))
    want = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    for found in workers.by_rank(folder, case):
        assert_gradients(found, want, 1e-9)


def test_a_fault_on_one_rank(folder: Path) -> None:
    assert workers.by_rank(folder, "fails") == [["RuntimeError", "True"], ["ValueError", "True"]]
