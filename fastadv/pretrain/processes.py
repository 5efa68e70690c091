"""The processes of one training: those that torchrun started, or this one alone."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = dt.timedelta(minutes=10)  # for a rank that hangs; one that has died is noticed at once


@dataclass(frozen=True)
class Processes:
    """This process among those of one training. Alone it sends nothing, and there is no process group.

    Attributes:
        saving: the group in which checkpoints are written behind the training's back.
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    saving: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes logs and prints."""
        return self.rank == 0

    def sums(self, *numbers: int) -> list[int]:
        """Add up each number over the processes, on the CPU: no device is waited for."""
        if self.world == 1:
            return list(numbers)
        summed = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(summed)
        found: list[int] = summed.tolist()
        return found

    def table(self, numbers: Sequence[float]) -> list[list[float]]:
        """List the numbers of every process, by rank."""
        if self.world == 1:
            return [list(numbers)]
        mine = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        return [one.tolist() for one in every]

    def told(self, value: Any) -> Any:
        """Hear what the first process has."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]

    def wait(self) -> None:
        """Wait for all others to come here."""
        self.sums(0)


@contextlib.contextmanager
def started(timeout: dt.timedelta = TIMEOUT) -> Iterator[Processes]:
    """Join the process group that torchrun's environment describes, or the one that is there; leave what was joined.

    A CPU trains over gloo, GPUs over NCCL, with gloo for what is said between hosts.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    joined = not dist.is_initialized() and world > 1
    if joined:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timeout)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield Processes(device)
        return
    saving = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield Processes(device, dist.get_rank(), dist.get_world_size(), saving)
    finally:
        if joined:
            dist.destroy_process_group()
