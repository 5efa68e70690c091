"""Times are compared only where the trainings ran alike."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import psutil
import pytest
import torch

from fastadv.jobs.conditions import Watch, obstacles

ALIKE = {"host": "a", "processor": "p", "cores": 2, "threads": 2, "session": "1", "resumed": False, "others": 0.0}


def cost(**changes: Any) -> dict[str, Any]:
    return {"device": "cpu", "seconds_per_step": 1.0, "conditions": {**ALIKE, **changes}}


def test_alike() -> None:
    assert obstacles(cost(), cost()) == []
    assert obstacles(cost(others=0.1), cost(others=0.3)) == [], "hardly anything"
    assert obstacles(cost(cores=16), cost(cores=16, others=9.0)) == [], "there were cores for both"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"threads": 1}, "with 2 and 1 threads"),
        ({"session": "2"}, "interrupted and resumed"),
        ({"resumed": True}, "interrupted and resumed"),
        ({"others": 1.5}, "0.0 and 1.5 cores busy"),
        ({"host": "b"}, "on different machines"),
        ({"processor": "q"}, "on different processors (p and q)"),
    ],
)
def test_obstacles(changes: dict[str, Any], reason: str) -> None:
    (found,) = obstacles(cost(), cost(**changes))
    assert reason in found
    assert len(obstacles(cost(**changes), cost())) == 1


def test_on_a_gpu_the_load_of_the_host_counts_for_nothing() -> None:
    one, other = ({**cost(others=others), "device": "cuda:0"} for others in (0.0, 2.0))
    assert obstacles(one, other) == []
    assert "different machines" in obstacles(one, cost())[0]


def test_a_result_of_an_earlier_version() -> None:
    assert "were not recorded" in obstacles({"device": "cpu"}, cost())[0]


def test_watch_sees_what_else_runs() -> None:
    """Another process that computes for as long as we watch; what this one does itself does not count."""
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = psutil.Process(other.pid).cpu_times().user
        with Watch(resumed=True) as watch:
            begun = time.perf_counter()
            while time.perf_counter() - begun < 0.5:
                torch.zeros(1000).sum()
            seconds = time.perf_counter() - begun
        used = psutil.Process(other.pid).cpu_times().user - before
    finally:
        other.kill()
        other.wait()
    found = watch.conditions
    assert found is not None
    assert found.others * seconds > 0.5 * used - 0.1
    assert (found.resumed, found.threads, found.cores) == (True, torch.get_num_threads(), psutil.cpu_count())
    assert set(asdict(found)) == set(ALIKE)
