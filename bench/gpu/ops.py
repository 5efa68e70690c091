"""Every op at a size that no cache holds, against the copy of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from bench.cases import GRADIENTS, OPS, Case, Gradients, Workload
from bench.gpu.clock import captured, device_race, microseconds
from bench.race import Copy, Entry
from bench.workloads import Shape


class Size(NamedTuple):
    """Of one batch and its table, and of a model's gradients."""

    shape: Shape
    gradients: tuple[int, int]


SIZES = {
    "full": Size(Shape(256, 512, 30_522, 1024), (200, 600_000)),
    "tiny": Size(Shape(4, 16, 50, 32), (5, 300)),
}


def measured(size: Size, device: torch.device, copy: Copy, rounds: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Each op's figures in bfloat16, as soon as they are there."""
    for name, case in cases(size, device.type):
        result = device_race({name: Entry(lambda: None, captured(case.run))}, rounds, copy)
        us = microseconds(result)[name]
        gbps = case.moved / us / 1e3
        share = gbps / (result.bandwidth / 1e9)
        yield name, {"bytes": case.moved, "us": us, "gbps": round(gbps, 1), "share_of_copy": round(share, 3)}


def cases(size: Size, device: str) -> Iterator[tuple[str, Case]]:
    """One after the other: what one holds is free for the next."""
    work = Workload(size.shape, device, torch.bfloat16, passes=2)
    for name, build in OPS.items():
        yield name, build(work)
    gradients = Gradients(*size.gradients, device)
    for name, make in GRADIENTS.items():
        yield name, make(gradients)
