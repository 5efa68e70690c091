"""All campaigns: what each is called in the table, how many cases the whole one has, and how they are portioned."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from tests.campaigns.result import Result


@dataclass(frozen=True)
class Campaign:
    """One row of the table.

    Attributes:
        title: what it does, as the table says it.
        module, function: who runs it: `(count, seed) -> Result`.
        total: cases of the whole campaign.
        portion: cases of one part, which has a process of its own.
    """

    title: str
    module: str
    function: str
    total: int
    portion: int

    def run(self, count: int, seed: int) -> Result:
        module = importlib.import_module(f"tests.campaigns.{self.module}")
        found: Result = getattr(module, self.function)(count, seed)
        return found


def _steps(title: str, function: str, total: int, portion: int = 500) -> Campaign:
    return Campaign(title, "trials", function, total, portion)


CAMPAIGNS: dict[str, Campaign] = {
    "operations": _steps("an exception at the n-th torch operation of a call", "torch_operations", 20_000),
    "calls": _steps("an exception where a Python function is entered or a C function returns", "python_calls", 30_000),
    "signals": _steps("a SIGINT raised there", "signals_at_calls", 2_000),
    "sigints": _steps("a SIGINT from another process, at a random time", "sigints", 20_000),
    "storms": _steps("a storm of 2 to 8 of them", "storms", 2_000, 400),
    "twice": _steps("a fault, and a second or a SIGINT while it is dealt with", "second_faults", 2_000, 400),
    "cleanup": _steps("an exception, and one in any function that deals with it", "faults_in_the_clean_up", 1_000, 400),
    "compiled": _steps("faults in the calls of a compiled model", "compiled", 800, 400),
    "ranks": Campaign("the closure fails in the same pass of both ranks of a DDP", "ranks", "ranks", 400, 200),
    "kills": Campaign("SIGKILL of train, compare and sweep, then --resume", "others", "killed", 100, 10),
    "files": Campaign("hostile files and arguments", "others", "files", 400, 200),
    "ops": Campaign("fuzzed cases of the ops", "others", "ops", 180_000, 18_000),
    "native": Campaign("hostile calls of the native functions", "others", "native", 2_000, 250),
}
