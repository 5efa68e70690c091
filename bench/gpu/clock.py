"""Device time: a step as a CUDA graph, between two events, after a copy that leaves nothing of it in the caches."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch

from bench.race import Copy, Entry, Result, race, rotated

WARMUP = 3
Run = Callable[[], object]


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


def device_race(entries: dict[str, Entry], rounds: int, copy: Copy) -> Result:
    """`bench.race.race`, by the device's clock: what waits for the device in its middle pays for that as well.

    While the device copies, the host is ahead and prepares what comes next.
    """
    if not torch.cuda.is_available():
        return race(entries, rounds, copy)
    marks: dict[str, list[tuple[Any, Any, Any]]] = {name: [] for name in entries}
    gc.collect()
    gc.disable()
    try:
        for index in range(-WARMUP, rounds):
            for name in rotated(list(entries), index):
                entries[name].setup()
                found = _marked(copy, entries[name].run)
                if index >= 0:
                    marks[name].append(found)
    finally:
        gc.enable()
    torch.cuda.synchronize()
    seconds = {name: [begun.elapsed_time(end) / 1e3 for _, begun, end in rows] for name, rows in marks.items()}
    copied = [start.elapsed_time(begun) / 1e3 for rows in marks.values() for start, begun, _ in rows]
    return Result(seconds, copied, copy.bytes)


def _marked(copy: Run, run: Run) -> tuple[Any, Any, Any]:
    start, begun, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    start.record()
    copy()
    begun.record()
    run()
    end.record()
    return start, begun, end


def microseconds(result: Result) -> dict[str, float]:
    """The median of each contestant."""
    return {name: round(1e6 * sorted(rows)[len(rows) // 2], 2) for name, rows in result.seconds.items()}
