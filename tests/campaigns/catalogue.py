"""All campaigns: what each is called in the table, how many cases the whole one has, and how they are portioned."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.campaigns.result import Result, read


@dataclass(frozen=True)
class Campaign:
    """One row of the table.

    Attributes:
        title: what it does, as the table says it.
        module, function: who runs it: `(count, seed) -> Result`, or a dictionary as `result.read` takes it.
        total: cases of the whole campaign.
        portion: cases of one part, which has a process of its own.
        takes: the arguments before the seed, where they are not the count alone.
    """

    title: str
    module: str
    function: str
    total: int
    portion: int
    takes: Callable[[int], tuple[Any, ...]] = lambda count: (count,)

    def run(self, count: int, seed: int) -> Result:
        function = getattr(importlib.import_module(f"tests.campaigns.{self.module}"), self.function)
        found = function(*self.takes(count), seed)
        return found if isinstance(found, Result) else read(found)


CAMPAIGNS: dict[str, Campaign] = {
    "operations": Campaign("an exception at the n-th torch operation of a call", "trials", "torch_operations", 20_000, 500),
    "calls": Campaign(
        "an exception at an entry of a Python function or a return of a C function", "trials", "python_calls", 30_000, 500
    ),
    "signals": Campaign("a SIGINT raised there", "trials", "signals_at_calls", 5_000, 500),
    "sigints": Campaign("a SIGINT from another process, at a random time", "trials", "sigints", 20_000, 500),
    "storms": Campaign("a storm of 2 to 8 of them", "trials", "storms", 4_000, 400),
    "twice": Campaign("two faults, the second while the first is dealt with", "trials", "second_faults", 4_000, 400),
    "compiled": Campaign("faults in a compiled model's calls", "trials", "compiled", 1_600, 400),
    "ranks": Campaign("the same closure fails on both ranks of a DDP", "ranks", "ranks", 1_000, 250),
    "kills": Campaign(
        "SIGKILL of train, compare and sweep, then --resume", "kills", "all_kills", 100, 5
    ),
    "files": Campaign("hostile files and arguments", "hostile_files", "hostile_files", 1_000, 250),
    "ops": Campaign("fuzzed cases of the ops", "fuzz_ops", "fuzz_ops", 180_000, 18_000, lambda count: (count // 9,)),
    "native": Campaign("hostile calls of the native functions", "hostile_calls", "hostile_calls", 2_000, 250),
}
