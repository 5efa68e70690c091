"""Under what a training was timed: two times are compared only where this was the same."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import torch

if TYPE_CHECKING:
    from typing_extensions import Self

CROWDED = 0.25  # of a training's threads: by so much more may have to wait in one of two trainings
IDLE = {"idle", "iowait", "guest", "guest_nice"}  # guests count as user already


@dataclass(frozen=True)
class Conditions:
    """Say where a training ran and what else ran there."""

    host: str
    processor: str
    cores: int
    threads: int
    session: str  # the process
    resumed: bool  # its first steps ran in an earlier process
    others: float  # cores that other processes kept busy meanwhile, the mean


class Watch:
    """Watch the machine between entry and exit."""

    def __init__(self, *, resumed: bool) -> None:
        self.resumed = resumed
        self.conditions: Conditions | None = None

    def __enter__(self) -> Self:
        self._begun, self._all, self._own = time.perf_counter(), _busy(), _own()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = max(time.perf_counter() - self._begun, 1e-9)
        others = (_busy() - self._all - (_own() - self._own)) / seconds
        self.conditions = Conditions(
            platform.node(),
            processor(),
            psutil.cpu_count() or 1,
            torch.get_num_threads(),
            f"{os.getpid()}, started {psutil.Process().create_time():.0f}",
            self.resumed,
            round(max(0.0, others), 2),
        )


def _busy() -> float:
    """Count the seconds that all cores have worked since the machine started."""
    times = psutil.cpu_times()._asdict()
    return sum(float(seconds) for name, seconds in times.items() if name not in IDLE)


def _own() -> float:
    used = psutil.Process().cpu_times()
    return float(used.user + used.system)


def obstacles(plain: Mapping[str, Any], adversarial: Mapping[str, Any]) -> list[str]:
    """Say why the times of two costs cannot be compared; nothing if they can."""
    one, other = plain.get("conditions"), adversarial.get("conditions")
    if one is None or other is None:
        return ["the conditions of the two trainings were not recorded"]
    found = []
    if plain["device"] != adversarial["device"] or one["host"] != other["host"]:
        found.append(f"they ran on different machines ({_place(plain)} and {_place(adversarial)})")
    elif one["processor"] != other["processor"]:
        found.append(f"they ran on different processors ({one['processor']} and {other['processor']})")
    if one["threads"] != other["threads"]:
        found.append(f"they ran with {one['threads']} and {other['threads']} threads")
    if one["resumed"] or other["resumed"] or one["session"] != other["session"]:
        found.append("the run was interrupted and resumed, so that their steps ran at different times")
    if plain["device"] == "cpu" and abs(_crowd(one) - _crowd(other)) > CROWDED:
        found.append(f"other processes kept {one['others']:.1f} and {other['others']:.1f} cores busy meanwhile")
    return found


def _place(cost: Mapping[str, Any]) -> str:
    return f"{cost['device']} of {cost['conditions']['host']}"


def _crowd(conditions: Mapping[str, Any]) -> float:
    """Compute the share of a training's threads that had to wait for a core."""
    wanted = conditions["threads"] + conditions["others"] - conditions["cores"]
    return float(max(0.0, wanted) / conditions["threads"])


def processor() -> str:
    """Name the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
