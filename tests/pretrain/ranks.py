"""What each of two gloo processes trains; the weights go to files that the tests read."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastadv.pretrain import methods
from fastadv.pretrain.processes import started
from tests.pretrain import toy

WORLD = 2

# Objective, method, options; one process cuts its rows into other micro-batches than two.
CASES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    **{f"causal-{name}": ("causal", name, ()) for name in methods.offered()},
    "causal-plain-last": ("causal", "plain", ("--communication", "last")),
    "causal-freelb-keep": ("causal", "freelb", ("--communication", "keep")),
    "causal-pgd-every": ("causal", "pgd", ("--every", "2")),
    "masked-freelb": ("masked", "freelb", ()),
    "masked-smart": ("masked", "smart", ()),
}
MICRO = {1: 3, 2: 2}


def case(name: str, folder: Path, processes: Any) -> dict[str, torch.Tensor]:
    """The weights after ten steps."""
    model, method, extra = CASES[name]
    wanted = toy.settings(folder, model, micro_batch=MICRO[processes.world])
    place = folder / f"{name}-of-{processes.world}"
    if processes.first:
        place.mkdir()
    processes.wait()
    return toy.weights(toy.train(place, wanted, processes, method, extra))


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
    dist.destroy_process_group()
