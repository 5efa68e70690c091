"""Whether pretraining's methods cost more than their passes: `python -m bench.pretrain_throughput`.

Whole optimizer steps of the default small model, each method's through `train_step` with the loader of the command, in
turns with the bare passes of its schedule (`bench.bare_passes`) on the same rows. A method's ratio is its step over
plain training's; the ideal is the same of bare passes; the excess is the one over the other, less 1. One thread, and
the CPU seconds of the process beside those of the clock: they count while others wait for the core as well.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import tempfile
import textwrap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench import bare_passes, machine
from bench.bare_passes import Bare, Passes
from bench.race import interval, iqr, quiet, turns
from fastadv.jobs.conditions import Watch
from fastadv.pretrain import data, methods, trainer
from fastadv.pretrain.processes import Processes
from fastadv.pretrain.settings import PLAIN_ONLY, Settings
from fastadv.pretrain.step import Training, train_step

DOCS = Path(__file__).parents[1] / "docs"
RESULT, PAGE = DOCS / "results/pretrain_throughput.json", DOCS / "pretraining.md"
BEGIN, END = "<!-- what a step costs: from here on by bench/pretrain_throughput.py -->", "<!-- to here -->"
ROUNDS, WARMUP = 24, 2
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
KINDS = ("bare", "step")
HEAPS = {"users": "users' heap", "retained": "retained heap"}
FULL, PROBE = 3, 2  # units: a forward, the gradient of activations, that of weights


@dataclass(frozen=True)
class Case:
    """A method at pretraining's defaults but for `extra`, and its schedule.

    Attributes:
        title: as the page has it.
        method: its name.
        passes: what its step costs at least.
        shown: the passes in words.
        full: full passes of an attacked step.
        probes: its other passes through all layers.
        predicted: the excess that was expected before anything was measured.
        extra: the method's options, as the command has them.
        every: it attacks each so many steps: a turn is as many.
    """

    title: str
    method: str
    passes: Passes
    shown: str
    full: int
    probes: int
    predicted: float
    extra: tuple[str, ...] = ()
    every: int = 1

    @property
    def over_plain(self) -> float:
        """The ratio by units, partial passes left out."""
        return (self.full + (self.every - 1) + self.probes * PROBE / FULL) / self.every


CASES = (
    Case("`plain`", PLAIN_ONLY, bare_passes.full, "1 full", 1, 0, 0.0),
    Case("`neftune`", "neftune", bare_passes.full, "1 full", 1, 0, 0.02),
    Case("`fgm`", "fgm", bare_passes.full_twice, "2 full", 2, 0, 0.01),
    Case("`freelb` (2 steps)", "freelb", bare_passes.full_twice, "2 full", 2, 0, 0.015),
    Case(
        "`freelb --every 4`",
        "freelb",
        bare_passes.full_twice,
        "2 full, each 4th step; else 1",
        2,
        0,
        0.01,
        ("--every", "4"),
        4,
    ),
    Case("`pgd` (2 steps)", "pgd", bare_passes.pgd, "2 full, 1 probe", 2, 1, 0.01),
    Case(
        "`pgd --clean-weight 0`",
        "pgd",
        bare_passes.pgd_adversarial,
        "1 full, 2 probes",
        1,
        2,
        0.015,
        ("--clean-weight", "0", "--adv-weight", "1"),
    ),
    Case("`smart` (1 step)", "smart", bare_passes.smart, "2 full, 1 probe", 2, 1, 0.0),
    Case("`vat` (1 step)", "vat", bare_passes.vat, "2 full, 1 probe", 2, 1, 0.01),
    Case("`yopo` (2 by 2)", "yopo", bare_passes.yopo, "2 full, 1 through the first layer", 2, 0, 0.02),
)
ATTACKED = [case for case in CASES if case.method != PLAIN_ONLY]


def contestants(settings: Settings, found: data.Data) -> dict[tuple[str, str], Callable[[], None]]:
    """A turn of each: `every` steps of the method, and of its bare passes, each with its own model and loader."""
    alone = Processes(torch.device("cpu"))
    entries: dict[tuple[str, str], Callable[[], None]] = {}
    for case in CASES:
        options = methods.arguments(case.method, case.extra)
        plain = methods.arguments(PLAIN_ONLY)
        ours = trainer.prepare(settings, found.tokenizer, case.method, options, alone)
        theirs = trainer.prepare(settings, found.tokenizer, PLAIN_ONLY, plain, alone)
        bare = Bare(theirs, iter(found.loader()), case.passes, case.every)
        entries[case.title, KINDS[0]] = _times(case.every, bare.step)
        entries[case.title, KINDS[1]] = _times(case.every, _steps(ours, iter(found.loader())))
    return entries


def _steps(training: Training, batches: Iterator[Any]) -> Callable[[], None]:
    numbers = itertools.count()

    def step() -> None:
        train_step(training, next(numbers), next(batches))

    return step


def _times(count: int, step: Callable[[], None]) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(count):
            step()

    return turn


def measure(settings: Settings, found: data.Data, rounds: int, warmup: int) -> dict[str, Any]:
    """Every contestant twice a round, there and back, so that neighbours are as often one before the other."""
    entries, cases = contestants(settings, found), {case.title: case for case in CASES}
    sums: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0.0] * rounds)
    with quiet(), Watch(resumed=False) as watch:
        for index, order in turns(list(cases), rounds, warmup, back=True):
            gc.collect()
            for position, title in enumerate(order):
                for kind in KINDS if position < len(cases) else KINDS[::-1]:
                    spent = _timed(entries[title, kind])
                    for clock, seconds in spent.items() if index >= 0 else ():
                        sums[title, kind, clock][index] += seconds / 2 / cases[title].every
    assert watch.conditions is not None
    conditions = asdict(watch.conditions)
    return {
        "machine": {**machine.describe(), "others": conditions["others"]},
        "text": found.source.what,
        "settings": {name: getattr(settings, name) for name in ("batch_tokens", "length", "micro_batch", "dtype")},
        "rounds": rounds,
        "cases": [{"case": case.title, "predicted": case.predicted, **_found(case, sums)} for case in CASES],
    }


def _timed(turn: Callable[[], None]) -> dict[str, float]:
    begun = {name: clock() for name, clock in CLOCKS.items()}
    turn()
    return {name: clock() - begun[name] for name, clock in CLOCKS.items()}


def _found(case: Case, sums: Mapping[tuple[str, str, str], list[float]]) -> dict[str, Any]:
    """By each clock: milliseconds of a step, ratios to plain training round by round, and the excess."""
    plain, found = CASES[0].title, {}
    for clock in CLOCKS:
        step, bare = (sums[case.title, kind, clock] for kind in KINDS[::-1])
        ratio, ideal = (
            [own / other for own, other in zip(mine, sums[plain, kind, clock], strict=True)]
            for kind, mine in zip(KINDS[::-1], (step, bare), strict=True)
        )
        excess = [a / b - 1 for a, b in zip(ratio, ideal, strict=True)]
        found[clock] = {
            "step_ms": _spread([1e3 * one for one in step], 2),
            "bare_ms": _spread([1e3 * one for one in bare], 2),
            "ratio": _spread(ratio, 4),
            "ideal": _spread(ideal, 4),
            "excess": {**_spread(excess, 4), "interval": [round(one, 4) for one in interval(excess)]},
            "over_bare": _spread([a / b - 1 for a, b in zip(step, bare, strict=True)], 4),
        }
    return found


def _spread(values: Sequence[float], digits: int) -> dict[str, Any]:
    return {"median": round(median(values), digits), "iqr": round(iqr(values), digits)}


def section(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The part of the page: a run on each heap."""
    said = [textwrap.wrap(_about(results[heap], heap), 120) for heap in HEAPS]
    expected = [f"{100 * f(case.predicted for case in ATTACKED):g}" for f in (min, max)]
    closing = f"Expected before it was measured: {expected[0]} to {expected[1]} %."
    return "\n".join([BEGIN, "", *_table(results), "", *said[0], "", *said[1], "", closing, "", END])


def _about(result: Mapping[str, Any], heap: str) -> str:
    """Where that was, and how sure it is."""
    where, rounds = result["machine"], result["rounds"]
    excesses = [found["cpu"]["excess"] for case, found in zip(CASES, result["cases"], strict=True) if case in ATTACKED]
    largest = max(100 * one["median"] for one in excesses)
    surest = max(100 * one["interval"][1] for one in excesses)
    return (
        f"With the {HEAPS[heap]}: {where['processor']}, one thread, {rounds} rounds in turns; other processes kept "
        f"{where['others']:.1f} of {where['cores']} cores busy meanwhile, so these are CPU seconds of the process. The "
        f"largest excess is {largest:.1f} %, and the 95 % intervals of the medians end at {surest:.1f} % at most."
    )


def _table(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A row of each method; a column of excesses from each heap there is."""
    heaps = [heap for heap in HEAPS if heap in results]
    excesses = " | ".join(f"excess (IQR), {HEAPS[heap]}" for heap in heaps)
    yield f"| method | passes a step, at the defaults here | by units | bare passes | measured | {excesses} |"
    yield "|---" * (5 + len(heaps)) + "|"
    for index, case in enumerate(CASES):
        found = [results[heap]["cases"][index] for heap in heaps]
        assert all(one["case"] == case.title for one in found)
        cpu = found[0]["cpu"]
        more = " and some" if case.passes is bare_passes.yopo else ""
        figures = [f"{case.over_plain:.3g}{more}", f"{cpu['ideal']['median']:.2f}", f"{cpu['ratio']['median']:.2f}"]
        over = [_percent(one["cpu"]["excess"]) if case in ATTACKED else "" for one in found]
        yield f"| {' | '.join([case.title, case.shown, *figures, *over])} |"


def _percent(spread: Mapping[str, float]) -> str:
    return f"{100 * spread['median']:+.1f} % ({100 * spread['iqr']:.1f})"


def write(result: Mapping[str, Any], heap: str) -> None:
    results = {**json.loads(RESULT.read_text(encoding="utf-8")), heap: result}
    RESULT.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + section(results) + rest.partition(END)[2], encoding="utf-8")


def main(arguments: Sequence[str] | None = None, settings: Settings | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench.pretrain_throughput", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--warmup", type=int, default=WARMUP, help=f"default: {WARMUP}")
    parser.add_argument(
        "--heap", choices=HEAPS, default="users", help="retained: glibc keeps what is freed, which saves page faults"
    )
    parser.add_argument(
        "--write", action="store_true", help="keep the result, and what docs/pretraining.md shows of it"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.heap == "retained" and not machine.retain_heap():
        parser.error("--heap retained needs glibc: leave it out")
    settings = settings or Settings()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(settings, data.prepare(settings, Path(folder)), options.rounds, options.warmup)
    print("\n".join(_table({options.heap: result})))
    print(json.dumps(result["machine"]))
    if options.write:
        write(result, options.heap)
    return result


if __name__ == "__main__":
    main()
