"""Where the time of a PGD training step goes, all of it: `python -m bench.profile_step` (`--help` has the options).

The engine's functions are wrapped from outside while a step is profiled. What passes between two marks belongs to the
innermost function that is open then, so that parts exclude each other and sum to the step. Hot: steps follow one
another, with no optimizer between them and nothing that empties the caches.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import fastadv
from bench import machine
from bench.workloads import classifier, zipf
from fastadv import native

NETWORKS = {"minilm": (384, 6, 12, 1536), "tiny": (32, 2, 2, 64)}  # bench.workloads.PARTS
FREED = "graphs freed"
MODEL = ("forward, full", "backward, full", "forward, probe", "backward, probe", FREED)
BESIDE = ("embedding", "table gradient", "attack", "bookkeeping", "the rest")
COLOURS = ("#1d5fbf", "#7ba7e0", "#0e7490", "#7cc4d1", "#a7f3d0", "#c2410c", "#a16207", "#7e22ce", "#6b7280", "#d1d5db")
# What is wrapped: the part that its own time counts to, its owner, and the names that it has there. Tensor.backward is
# not, which _hand_over calls: where a class of torch's changes, Python is slower afterwards.
RANGES = """
backward, full  | fastadv.engine.passes:Engine                 | _hand_over
backward, probe | torch.autograd                               | grad
embedding       | fastadv.engine.interception:Lookup           | __call__
embedding       | fastadv.engine.interception:OutputHook       | __call__
embedding       | fastadv.engine.interception:                 | gather_perturb
embedding       | fastadv.ops.gather_perturb:_GatherPerturb    | backward
embedding       | fastadv._C:                                  | gather_perturb_cpu
table gradient  | fastadv.engine.table_gradients:TableGradients | begin collect
table gradient  | fastadv.engine.table_gradients:              | zeros_like gather_perturb_backward
table gradient  | fastadv._C:                                  | gather_perturb_backward_cpu
attack          | fastadv.engine.passes:Engine                 | ascend
attack          | fastadv.engine.site:Site                     | grouped
attack          | fastadv.engine.perturbation:                 | table_step segment_sum ascend
attack          | fastadv._C:                                  | segments_cpu table_step_cpu segment_sum_cpu ascend_cpu
bookkeeping     | fastadv.engine.frame:Frame                   | step device
bookkeeping     | fastadv.engine.guard:Guard                   | _save
bookkeeping     | fastadv.ops.grads:Backup                     | save
bookkeeping     | fastadv.engine.rng:                          | save
bookkeeping     | fastadv.engine.site:Site                     | begin
bookkeeping     | fastadv.engine.perturbation:Perturbation     | watch
bookkeeping     | fastadv.engine.passes:Engine                 | _quiet _check_calls _finish
bookkeeping     | fastadv.methods.base:Method                  | _check_trainable
the rest        | fastadv.engine.passes:Engine                 | _descend probe _forward
the rest        | fastadv.methods.base:Method                  | backward
"""
SHORT, MORE = 0.5, 6  # a step of fewer seconds is noisy and cheap: so many times as many rounds
THREADS = (1, 2, 4, 8)
NO_CUDA = (
    "--device cuda: there the host runs ahead of the device, and clocks around Python time launches. `make gpu-check` "
    "has the passes' share of a step on a GPU, and nsys or torch.profiler its timeline, as docs/benchmarks.md shows"
)


class Case(NamedTuple):
    batch: int
    length: int
    vocabulary: int


CASES = (Case(16, 128, 30_522), Case(16, 128, 250_002), Case(2, 16, 30_522))


class Recorder:
    """Exclusive seconds by function. On the CPU autograd runs a backward in the thread that asks for it: one stack."""

    def __init__(self, *, traced: bool = False) -> None:
        self.traced = traced  # whether torch's profiler looks on, and is to see the same ranges
        self.clear()

    def clear(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.entries: defaultdict[str, int] = defaultdict(int)
        self.stack: list[tuple[str, Any]] = []
        self.since = 0.0
        self.loss: Any = None  # of the pass that runs

    def enter(self, name: str) -> None:
        if name == "forward":  # the closure is one, and runs in both kinds of pass
            name += ", probe" if any(outer == "Engine.probe" for outer, _ in self.stack) else ", full"
        self._mark()
        self.entries[name] += 1
        seen: Any = record_function(name) if self.traced else None
        self.stack.append((name, seen))
        if seen is not None:
            seen.__enter__()

    def leave(self) -> None:
        if self.stack[-1][0] in {"Engine._descend", "Engine.probe"} and self.loss is not None:
            self.enter(FREED)  # what is left of a pass's graph goes with its loss, here and in any other training
            self.loss = None
            self.leave()
        self._mark()
        _, seen = self.stack.pop()
        if seen is not None:
            seen.__exit__(None, None, None)

    def _mark(self) -> None:
        now = time.perf_counter()
        if self.stack:
            self.seconds[self.stack[-1][0]] += now - self.since
        self.since = now

    def forward(self, closure: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The model's own, in either kind of pass."""
        timed = self.around(closure, "forward")

        def run() -> Tensor:
            self.loss = timed()
            return cast("Tensor", self.loss)

        return run

    def around(self, function: Any, name: str) -> Any:
        """What stands in for `function`; of a context manager, both ends are timed."""
        if isinstance(function, (staticmethod, property)):
            inner = function.__func__ if isinstance(function, staticmethod) else function.fget
            return type(function)(self.around(inner, name))

        def run(*args: Any, **named: Any) -> Any:
            self.enter(name)
            try:
                return function(*args, **named)
            finally:
                self.leave()

        @contextlib.contextmanager
        def manage(*args: Any, **named: Any) -> Iterator[Any]:
            self.enter(name)
            try:
                with function(*args, **named) as value:
                    self.leave()
                    try:
                        yield value
                    finally:
                        self.enter(name)
            finally:
                self.leave()

        return manage if inspect.isgeneratorfunction(inspect.unwrap(function)) else run


def ranges() -> Iterator[tuple[Any, str, str, str]]:
    """Owner and name of everything that is wrapped, what tables call it, and the part of a step that it is."""
    for part, path, names in (map(str.strip, row.split("|")) for row in RANGES.strip().splitlines()):
        if native.available() or not path.startswith("fastadv._C"):
            shown = path.rstrip(":").replace(":", ".").split(".")[-1]
            yield from ((pkgutil.resolve_name(path), name, f"{shown}.{name}", part) for name in names.split())


@contextlib.contextmanager
def patched(recorder: Recorder) -> Iterator[None]:
    """Inside, everything in `ranges()` is wrapped; afterwards it is as it was."""
    found = [(owner, name, shown, vars(owner)[name]) for owner, name, shown, _ in ranges()]
    try:
        for owner, name, shown, original in found:
            setattr(owner, name, recorder.around(original, shown))
        yield
    finally:
        for owner, name, _, original in found:
            setattr(owner, name, original)


class Bench:
    """One case: its model, and what takes turns."""

    def __init__(self, case: Case, options: argparse.Namespace) -> None:
        self.model: Any = classifier(NETWORKS[options.model], case.vocabulary)
        batch = {"input_ids": zipf(*case), "labels": torch.arange(case.batch) % 2}
        self.closure = lambda: self.model(**batch).loss
        self.adv = fastadv.PGD(self.model, steps=options.steps, scope=options.scope)
        self.leaf = torch.empty(0)

    def passes_alone(self, closure: Callable[[], Any]) -> None:
        """A full pass, the probes and a full pass, without any attack; a leaf stands for the embedding's output."""
        with self.model.get_input_embeddings().register_forward_hook(self._replace):
            closure().backward()
            for _ in range(self.adv.steps - 1):
                torch.autograd.grad(closure(), self.leaf)
            closure().backward()

    def _replace(self, *called: Any) -> Tensor:
        self.leaf = called[-1].detach().requires_grad_()
        return self.leaf

    def time(self, who: str, times: int, *, traced: bool = False) -> tuple[float, Recorder]:
        """Seconds of the last of some `times`: Python forgets what it has specialised where something is wrapped."""
        recorder = Recorder(traced=traced)
        with patched(recorder) if who == "profiled" else contextlib.nullcontext():
            closure = recorder.forward(self.closure) if who == "profiled" else self.closure
            run: Callable[..., object] = self.passes_alone if who == "passes_alone" else self.adv.backward
            for _ in range(times):
                self.model.zero_grad()
                recorder.clear()
                start = time.perf_counter()
                run(closure)
                seconds = time.perf_counter() - start
        return seconds, recorder

    def race(self, rounds: int) -> Iterator[dict[str, tuple[float, Recorder]]]:
        """In every round the next one begins. What comes first warms up; in a long step wrappers are nothing."""
        names = ["profiled", "passes_alone"]
        short = min(self.time(name, 1)[0] for name in names) < SHORT
        names += ["step"] * short
        for index in range(rounds * MORE if short else rounds):
            first = index % len(names)
            yield {name: self.time(name, 1 + short) for name in names[first:] + names[:first]}

    def look(self, trace: Path | None, top: int) -> None:
        """One step under torch's profiler, which makes what is short slower than it is."""
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            self.time("profiled", 1, traced=True)
        if trace:
            seen.export_chrome_trace(str(trace))
        operators = [one for one in seen.key_averages() if one.key.startswith("aten::")]
        for one in sorted(operators, key=lambda one: -one.self_cpu_time_total)[:top]:
            print(f"{one.self_cpu_time_total / 1e3:10.3f} ms {one.count:6} times  {one.key}")


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One case: medians over rounds, and their interquartile ranges."""
    bench = Bench(case, options)
    gc.collect()
    gc.disable()
    try:
        rounds = list(bench.race(options.rounds))
    finally:
        gc.enable()
    if options.trace or options.top:
        bench.look(options.trace, options.top)
    bench.adv.close()
    times = {name: [turn[name][0] for turn in rounds] for name in ("profiled", "passes_alone")}
    times["step"] = [turn.get("step", turn["profiled"])[0] for turn in rounds]
    recorders, walls = [turn["profiled"][1] for turn in rounds], times["profiled"]
    part_of = {part: part for part in MODEL} | {shown: part for *_, shown, part in ranges()}
    parts = [_parts(recorder, wall, part_of) for recorder, wall in zip(recorders, walls, strict=True)]
    own = {name: 1e6 * median(recorder.seconds[name] for recorder in recorders) for name in recorders[0].seconds}
    last, added = recorders[-1].entries, [timeit.timeit(f, number=10_000) for f in (Recorder().around(int, "int"), int)]
    entered = sum(last.values())
    return {
        "case": f"{case.batch} x {case.length}, V = {case.vocabulary:,}",
        **case._asdict(),
        **{name: getattr(options, name) for name in ("model", "scope", "steps")},
        "threads": torch.get_num_threads(),
        "rounds": len(rounds),
        **{name: spread(seconds, times["step"]) for name, seconds in times.items()},
        "parts": {name: spread([one[name] for one in parts], walls) for name in (*MODEL, *BESIDE)},
        "exclusive": spread([sum(one[name] for name in BESIDE) for one in parts], walls),
        "difference": spread([a - b for a, b in zip(times["step"], times["passes_alone"], strict=True)], times["step"]),
        "functions": [
            {"name": name, "part": part_of[name], "calls": last[name], "us": round(own[name], 1)}
            for name in sorted(own, key=lambda name: -own[name])
        ],
        "wrappers": {"entered": entered, "us": round(1e2 * (added[0] - added[1]) * entered, 1)},
        "every_round": [{"wall": wall, "parts": one} for wall, one in zip(walls, parts, strict=True)],
    }


def _parts(recorder: Recorder, wall: float, part_of: dict[str, str]) -> dict[str, float]:
    """The seconds of every part; what lies outside of the first and the last mark is part of the rest."""
    found = dict.fromkeys((*MODEL, *BESIDE), 0.0)
    for name, seconds in recorder.seconds.items():
        found[part_of[name]] += seconds
    return {**found, "the rest": found["the rest"] + wall - sum(recorder.seconds.values())}


def spread(values: Sequence[float], wholes: Sequence[float]) -> dict[str, float]:
    """Milliseconds of seconds, and percent of the whole that each is of."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    percent = median(100 * value / whole for value, whole in zip(values, wholes, strict=True))
    return {"ms": round(1e3 * median(values), 4), "iqr_ms": round(1e3 * (high - low), 4), "percent": round(percent, 4)}


def oversubscribed(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The case on more and more threads, each in a process of its own: OpenMP reads its variable once."""
    given = [f"--{name}={getattr(options, name)}" for name in (*Case._fields, "model", "scope", "steps")]
    for threads in THREADS:
        with tempfile.TemporaryDirectory() as folder:
            file, environment = Path(folder, "case.json"), {**os.environ, "OMP_NUM_THREADS": str(threads)}
            command = [sys.executable, "-m", "bench.profile_step", *given, f"--threads={threads}", "--rounds=3"]
            subprocess.run([*command, f"--output={file}"], check=True, env=environment, stdout=subprocess.DEVNULL)
            yield json.loads(file.read_text(encoding="utf-8"))["cases"][0]


def tables(result: dict[str, Any]) -> str:
    """Markdown, of what is in the JSON."""
    lines = []
    for case in result["cases"]:
        lines += ["", f"| {case['case']} | ms (IQR) | % of the step |", "|---|---|---|"]
        own = {"all but the passes, by these clocks": case["exclusive"], "step - passes alone": case["difference"]}
        names = {"profiled": "the step, wrapped", "step": "the step, as it is", "passes_alone": "the passes alone"}
        for name, row in {**case["parts"], **own, **{names[name]: case[name] for name in names}}.items():
            lines.append(f"| {name} | {_cell(row)} | {row['percent']:.2f} |")
        lines += ["", f"| beside the passes, {case['case']} | part | calls | us |", "|---|---|---|---|"]
        functions = [row for row in case["functions"] if row["part"] in BESIDE][:16]
        lines += [f"| `{row['name']}` | {row['part']} | {row['calls']} | {row['us']:.1f} |" for row in functions]
    if result["oversubscribed"]:
        lines += ["", "| threads | the step, ms (IQR) | attack | all but the passes |", "|---|---|---|---|"]
    for case in result["oversubscribed"]:
        rows = case["profiled"], case["parts"]["attack"], case["exclusive"]
        lines.append(f"| {case['threads']} | {' | '.join(map(_cell, rows))} |")
    return "\n".join(lines[1:])


def _cell(row: dict[str, float]) -> str:
    digits = 1 if row["ms"] > 100 else 3
    return f"{row['ms']:,.{digits}f} ({row['iqr_ms']:,.{digits}f})"


def picture(cases: Sequence[dict[str, Any]]) -> str:
    """A bar for each case: the whole step, and what is not the model's passes on a scale of its own."""
    from fastadv.train.plots import svg

    def draw(figure: Any) -> None:
        for axes, shown in zip(figure.subplots(2, 1), ((*MODEL, *BESIDE), BESIDE), strict=True):
            left = [0.0] * len(cases)
            for name, colour in zip((*MODEL, *BESIDE), COLOURS, strict=True):
                if name in shown:
                    widths = [case["parts"][name]["percent"] for case in cases]
                    axes.barh([case["case"] for case in cases], widths, 0.6, left, color=colour, label=name)
                    left = [start + width for start, width in zip(left, widths, strict=True)]
            axes.invert_yaxis()
            axes.set_xlabel("% of a step" if shown != BESIDE else "% of a step: what is not the model's own passes")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center")

    return svg(draw, "profile", (9.4, 1.6 + 0.7 * len(cases)), opaque=True)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__)
    parser.add_argument("--rounds", type=int, help=f"default: 7, with --all 5; {MORE} times as many of a short step")
    for name, default in {"batch": 16, "length": 128, "vocabulary": 30_522, "threads": 2, "steps": 3, "top": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--scope", default="table", help="of fastadv.PGD")
    parser.add_argument("--model", choices=NETWORKS, default="minilm")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--all", action="store_true", help="the three cases of docs/benchmarks.md")
    parser.add_argument("--oversubscribed", action="store_true", help="the first case also on 1, 2, 4 and 8 threads")
    for name in ("output", "picture", "trace", "show"):  # show: the tables of an earlier output
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (5 if options.all else 7)
    if options.device == "cuda":
        parser.error(NO_CUDA)
    if options.all and (options.trace or options.top):
        parser.error("--trace and --top look at one case: leave out --all")
    result: dict[str, Any]
    if options.show:
        result = json.loads(options.show.read_text(encoding="utf-8"))
    else:
        torch.set_num_threads(options.threads)
        load = os.getloadavg()[0]  # of the last minute: what else ran
        cases = CASES if options.all else [Case(options.batch, options.length, options.vocabulary)]
        result = {"machine": {**machine.describe(), "load": load}, "cases": [measure(case, options) for case in cases]}
        result["oversubscribed"] = list(oversubscribed(options)) if options.oversubscribed else []
    print(tables(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        options.picture.write_text(picture(result["cases"]), encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
