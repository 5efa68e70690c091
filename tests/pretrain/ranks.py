"""What each of two gloo processes trains; the weights go to files that the tests read."""

from __future__ import annotations

import datetime as dt
import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastadv.jobs.errors import Interrupted
from fastadv.pretrain import loop, methods
from fastadv.pretrain.processes import started
from tests.pretrain import toy

WORLD = 2

LOW = {"dtype": "bfloat16", "activation_checkpointing": True}

# Objective, method, its options, settings; one process cuts its rows into other micro-batches than two.
CASES: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    **{f"causal-{name}": ("causal", name, (), {}) for name in methods.offered()},
    "causal-plain-last": ("causal", "plain", ("--communication", "last"), {}),
    "causal-freelb-keep": ("causal", "freelb", ("--communication", "keep"), {}),
    "causal-pgd-every": ("causal", "pgd", ("--every", "2"), {}),
    "masked-freelb": ("masked", "freelb", (), {}),
    "masked-smart": ("masked", "smart", (), {}),
    "low": ("causal", "freelb", (), LOW),
}
MICRO = {1: 3, 2: 2}


def case(name: str, folder: Path, processes: Any) -> dict[str, torch.Tensor]:
    """The weights after ten steps."""
    model, method, extra, given = CASES[name]
    wanted = toy.settings(folder, model, micro_batch=MICRO[processes.world], **given)
    return toy.weights(toy.train(made(folder, name, processes), wanted, processes, method, extra))


def made(folder: Path, name: str, processes: Any) -> Path:
    place = folder / f"{name}-of-{processes.world}"
    if processes.first:
        place.mkdir()
    processes.wait()
    return place


def interrupted(folder: Path, processes: Any) -> dict[str, Any]:
    """The last rank is told to stop, all do, and go on."""
    wanted, place = toy.settings(folder), made(folder, "interrupted", processes)
    original, said = loop.train_step, ""

    def told(training: Any, number: int, *rest: Any, **stop: Any) -> Any:
        if number == 5 and processes.rank == WORLD - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(training, number, *rest, **stop)

    loop.train_step = told
    try:
        toy.train(place, wanted, processes)
    except Interrupted as stopped:
        said = str(stopped)
    loop.train_step = original
    return {"said": said, "weights": toy.weights(toy.train(place, wanted, processes, resume=True))}


def run(rank: int, suite: str, folder: str) -> None:
    """All cases in one pair of processes."""
    del suite
    torch.set_num_threads(1)
    store = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=dt.timedelta(seconds=60))
    with started() as processes:
        for name in CASES:
            found: Any = case(name, Path(folder), processes)
            if processes.first:
                torch.save(found, Path(folder) / f"{name}.pt")
        torch.save(interrupted(Path(folder), processes), Path(folder) / f"interrupted-{rank}.pt")
    dist.destroy_process_group()
