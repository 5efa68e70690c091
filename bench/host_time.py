"""What a PGD-3 step costs the host beside its passes, with kernels that do nothing: `python -m bench.host_time`.

On a GPU the host prepares what the device runs, and a small step is as long as its host's part. So this is that part,
timed on the CPU: BERT-base's tree of 231 modules in tiny widths, and passes as cheap as passes can be (they are taken
off), once with ops that do nothing (the engine's own part) and once on a GPU's path with a driver that launches nothing
(`bench.nowhere`). Rounds in turns. Keep other work away: `OMP_NUM_THREADS=1 chrt -f 10 python -m bench.host_time`

Not in it: the driver's own part of a launch, changing the device, allocations there. In it although a GPU's step does
without: on the CPU ids are looked at, to see that they are in the table, and empty segments are cut off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import profiler

import fastadv
from bench import machine, nowhere
from bench.race import iqr, quiet, turns
from bench.training import step
from bench.workloads import Network, classifier, inputs, loss_closure

NETWORK: Network = (24, 12, 2, 32)  # BERT-base's layers, and next to no arithmetic
WORK = (2, 16, 500)
MODULES = 231
SCOPES = ("table", "sample")
WARMUP = 5
NOTHING = contextlib.nullcontext()
LAUNCHES, REST = "launches", "the rest"
PARTS = {  # the engine's ranges, and the launches inside of them
    "fastadv::guard": "guard",
    "fastadv::segments": "where equal ids lie",
    "fastadv::lookup": "lookups",
    "fastadv::ascend": "ascents",
    "fastadv::table_gradient": "the table's gradient",
    LAUNCHES: "launches by Triton",
    "fastadv::step": REST,
}
EMPTY, PATH, COLD = TITLES = ("ops do nothing", "a GPU's path", "a GPU's path, all layers")


class Case(NamedTuple):
    scope: str
    title: str  # of TITLES

    @property
    def cheap(self) -> bool:
        """Whether a pass is of the embeddings alone. Those of all layers push the engine out of the caches."""
        return self.title != COLD

    def ops(self, clock: Clock) -> contextlib.AbstractContextManager[None]:
        """What they do."""
        if self.title == EMPTY:
            return nowhere.nothing()
        return nowhere.on_the_cpu(lambda _: clock.range(LAUNCHES) if clock.runs else NOTHING)


class Clock:
    """Nanoseconds of each range of a step without those inside of it, in place of torch's slow profiler."""

    def __init__(self) -> None:
        self.spent: dict[str, int] = defaultdict(int)
        self.runs = False
        self._inside: list[str] = []
        self._since = 0

    def range(self, name: str) -> Range:
        return Range(self, name)

    def change(self, name: str | None) -> None:
        """Enter a range, or leave the innermost one."""
        now = time.perf_counter_ns()
        if self._inside:
            self.spent[self._inside[-1]] += now - self._since
        if name is None:
            self._inside.pop()
        else:
            self._inside.append(name)
        self._since = time.perf_counter_ns()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the engine's ranges are this clock's."""
        function, profiler.record_function = profiler.record_function, self.range  # type: ignore[misc]
        profiler._is_profiler_enabled = self.runs = True
        try:
            yield
        finally:
            profiler._is_profiler_enabled = self.runs = False
            profiler.record_function = function  # type: ignore[misc]


class Range:
    __slots__ = ("clock", "name")

    def __init__(self, clock: Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.clock.change(self.name)

    def __exit__(self, *_: object) -> None:
        self.clock.change(None)


def embeddings_alone(model: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The cheapest pass: words looked up, and a sum of them."""
    table, factors = model.get_input_embeddings(), torch.randn(*batch["input_ids"].shape, NETWORK[0])

    def closure() -> Tensor:
        loss: Tensor = (table(batch["input_ids"]) * factors).sum()
        return loss

    return closure


def contestants(scope: str, clock: Clock, cheap: bool) -> dict[str, tuple[nn.Module, Callable[[], object]]]:
    """A step, the same by the clock, and its passes by hand on a model of their own, which has no hook of ours."""
    model, plain = classifier(NETWORK, WORK[-1]), classifier(NETWORK, WORK[-1])
    assert len(list(model.modules())) == MODULES
    batch = inputs(*WORK)
    ours, by_hand = (embeddings_alone(one, batch) if cheap else loss_closure(one, batch) for one in (model, plain))
    adv = fastadv.PGD(model, scope=scope)

    def by_the_clock() -> None:
        with clock.running():
            adv.backward(ours)

    return {
        "step": (model, lambda: adv.backward(ours)),
        "by the clock": (model, by_the_clock),
        "passes": (plain, step("passes alone", "PGD-3", plain, by_hand)),
    }


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Microseconds of a step beside its passes: by subtraction, and part by part by the clock."""
    clock, seconds, parts = Clock(), defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
    with case.ops(clock), quiet():
        entries = contestants(case.scope, clock, case.cheap)
        for index, order in turns(list(entries), rounds, WARMUP):
            for name in order:
                model, run = entries[name]
                model.zero_grad()
                clock.spent.clear()
                start = time.perf_counter_ns()
                run()
                taken = time.perf_counter_ns() - start
                if index < 0:
                    continue
                seconds[name].append(taken / 1e3)
                for part, spent in clock.spent.items():
                    parts[part].append(spent / 1e3)
    shown = {title: parts[name] for name, title in PARTS.items() if name in parts}
    if not case.cheap:
        del shown[REST]  # where a model's graphs are freed
    result: dict[str, Any] = {
        "scope": case.scope,
        "case": case.title,
        "rounds": rounds,
        "parts": {title: spread(values) for title, values in shown.items()},
        "together": spread([sum(one) for one in zip(*shown.values(), strict=True)]),
        "step": spread(seconds["step"]),
        "passes_by_hand": spread(seconds["passes"]),
    }
    if case.cheap:  # real passes differ from each other by more than the engine takes
        beside = [a - b for a, b in zip(seconds["step"], seconds["passes"], strict=True)]
        result["beside"] = spread(beside)
    return result


def addition() -> float:
    """Microseconds of the smallest addition in torch: how fast this machine is just now."""
    one, times = torch.ones(4), []
    for _ in range(500):
        start = time.perf_counter_ns()
        one.add(1)
        times.append((time.perf_counter_ns() - start) / 1e3)
    return round(median(times), 2)


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"us": round(median(values), 1), "iqr_us": round(iqr(values), 1)}


def table(cases: Sequence[dict[str, Any]]) -> str:
    """Markdown, as docs/kernels.md has it."""
    names = dict.fromkeys(name for case in cases for name in case["parts"])
    rows = {name: [case["parts"].get(name) for case in cases] for name in names}
    rows["**together, by the clock**"] = [case["together"] for case in cases]
    rows["**the step minus its passes by hand**"] = [case.get("beside") for case in cases]
    titles = [f"{case['scope']}, {case['case']}" for case in cases]
    lines = [f"| us of a PGD-3 step (IQR) | {' | '.join(titles)} |", "|---" * (len(cases) + 1) + "|"]
    for name, row in rows.items():
        cells = ["" if one is None else "{us:.0f} ({iqr_us:.0f})".format(**one) for one in row]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench.host_time", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="default: 200, and a fifth of it with all layers")
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    before, load = addition(), os.getloadavg()[0]
    cases = [
        measure(Case(scope, title), options.rounds if Case(scope, title).cheap else max(options.rounds // 5, 2))
        for title in TITLES
        for scope in SCOPES
    ]
    result = {"machine": {**machine.describe(), "load": load, "addition_us": [before, addition()]}, "cases": cases}
    print(table(cases))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
