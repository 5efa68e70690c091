"""Device time: a step as a CUDA graph, between two events, after a copy that leaves nothing of it in the caches."""

from __future__ import annotations

from typing import Any

import torch

from bench.race import Copy, Entry, Reading, Result, Run, race

WARMUP = 3  # runs before a capture


def captured(run: Run) -> Run:
    """`run` as a CUDA graph: the host is out of the way. Without a GPU, `run`."""
    if not torch.cuda.is_available():
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def device_race(entries: dict[str, Entry], rounds: int, copy: Copy, **limits: Any) -> Result:
    """`bench.race.race`, by the device's clock: what waits for the device in its middle pays for that as well.

    While the device copies, the host is ahead and prepares what comes next.
    """
    clock = _device_clock if copy.source.is_cuda else None
    return race(entries, rounds, copy, clock, **limits)


def _device_clock(copy: Run, run: Run) -> Reading:
    start, begun, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    copy()
    begun.record()
    run()
    end.record()

    def reading() -> tuple[float, float]:
        end.synchronize()
        return start.elapsed_time(begun) / 1e3, begun.elapsed_time(end) / 1e3

    return reading


def microseconds(result: Result) -> dict[str, float]:
    """The median of each contestant."""
    return {name: round(1e6 * sorted(rows)[len(rows) // 2], 2) for name, rows in result.seconds.items()}
