"""Every case of the registry, and the peak memory of two of them, each contestant in a process of its own."""

from __future__ import annotations

from typing import Any

import pytest

from bench import memory
from bench.contest import Case


@pytest.mark.filterwarnings("ignore:FreeAT")  # no optimizer steps between replays: they are not timed
def test_case(show: Any, contests: Any, heap: str, group: str, case: Case, contestant: str) -> None:
    show(group, *contests.find(heap, group, case, contestant))


def test_memory(show: Any, contests: Any, weighed: tuple[str, str], contestant: str) -> None:
    group, case = weighed
    seconds, found = memory.apart(case, contestant, contests.size, contests.info["size"], contests.rounds or 1)
    show(group, seconds, {**contests.info, "heap": "users", "contestant": contestant, **found})
