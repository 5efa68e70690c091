"""Two gloo processes inside of a training framework, each with half of every batch, against one that has all of it.

What is trained: `tests.distributed.workers.build()` in float64, some optimizer steps of SGD, each over two
micro-batches whose losses count half.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from tests.distributed.workers import METHODS, WORLD, build, step
from tests.support import assert_gradients, batch, same_bits

NAMES = ["pgd-sample", "yopo-sample", "smart", "vat", "held-smart"]
STEPS, MICRO, RATE = 2, 2, 0.5
TOLERANCE = 1e-10

Case = Callable[[int, str], dict[str, Tensor]]


def micro_batches() -> Iterator[tuple[int, bool, dict[str, Tensor]]]:
    """The seed of each, whether an optimizer step follows, and the whole of it."""
    for seed in range(STEPS * MICRO):
        yield seed, seed % MICRO == MICRO - 1, batch(seed=seed)


def make(name: str, model: nn.Module, **options: Any) -> Any:
    method, arguments = METHODS[name]
    return method(model, embedding="word_embeddings", **arguments, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in found.items()}


def alone(name: str) -> dict[str, Tensor]:
    """One process, no framework: the weights at the end."""
    model = build()
    adv = make(name, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE / MICRO)  # the framework divides the sum of two losses
    if hasattr(adv, "attach"):
        adv.attach(optimizer)
    for _, due, data in micro_batches():
        step(adv, model, data)
        if due:
            optimizer.step()
            optimizer.zero_grad()
    return weights(model)


def together(case: Case, names: list[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Run a case by every name in two processes: the weights that each name leaves, on both the same."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_rank, (case, names, str(folder), port), nprocs=WORLD)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(WORLD))
    for name in names:
        assert all(same_bits(first[name][key], second[name][key]) for key in first[name]), name
    return first


def _rank(rank: int, case: Case, names: list[str], folder: str, port: int) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "MASTER_PORT": port}
    os.environ.update({**{name: str(value) for name, value in place.items()}, "MASTER_ADDR": "127.0.0.1"})
    torch.set_num_threads(1)
    torch.save({name: case(rank, name) for name in names}, Path(folder, f"{rank}.pt"))
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)  # as distributed.workers does, and why


def assert_as_alone(found: dict[str, dict[str, Tensor]], tolerance: float = TOLERANCE, floor: float = 1e-6) -> None:
    start = weights(build())
    for name, mine in found.items():
        want = {key: value - start[key] for key, value in alone(name).items()}
        assert_gradients({key: value - start[key] for key, value in mine.items()}, want, tolerance, floor)
