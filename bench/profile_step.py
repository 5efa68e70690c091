"""Where the time of a PGD training step goes: `python -m bench.profile_step` (`--help` has the options).

A profiler slows down what it looks at. What the engine costs is therefore the step minus its passes by hand, timed in
turns with no profiler; shares come from the ranges that the engine carries (`fastadv::step` and those inside of it),
each without the ranges inside of it, so that they sum to the step. Hot: steps follow one another, with no optimizer
between them and nothing that empties the caches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import fastadv
from bench import machine
from bench.race import Copy, Entry, interval, iqr, once, race
from bench.training import step
from bench.workloads import MINILM, classifier, inputs, loss_closure

NETWORKS = {"minilm": MINILM, "tiny": (32, 2, 2, 64)}
STEP, REST = "fastadv::step", "the rest"
PARTS = {  # the engine's ranges, and the part of a step that each is
    "fastadv::forward": "forward",
    "fastadv::backward": "backward",
    "fastadv::ascend": "attack",
    "fastadv::start": "attack",
    "fastadv::table_gradient": "table gradient",
    "fastadv::guard": "guard",
    STEP: REST,
}
PASSES, BESIDE = ("forward", "backward"), ("attack", "table gradient", "guard", REST)
COLOURS = dict(zip((*PASSES, *BESIDE), ("#1d5fbf", "#7ba7e0", "#a16207", "#c2410c", "#7e22ce", "#d1d5db"), strict=True))
SHORT, MORE = 0.5, 6  # a step of fewer seconds is noisy and cheap: so many times as many rounds
THREADS = (1, 2, 4, 8)


class Case(NamedTuple):
    batch: int
    length: int
    vocabulary: int


CASES = (Case(16, 128, 30_522), Case(16, 128, 250_002), Case(2, 16, 30_522))


def look(entry: Entry) -> Any:
    entry.setup()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        entry.run()
    return seen


def parts(seen: Any) -> dict[str, float]:
    """Seconds of each range of a step without those inside of it."""
    found, inside = dict.fromkeys((*PASSES, *BESIDE), 0.0), list[tuple[str, float]]()
    ranges = [(one.name, one.time_range.start, one.time_range.end) for one in seen.events() if one.name in PARTS]
    if STEP not in (name for name, *_ in ranges):
        raise SystemExit(f"the profile shows no range {STEP!r}: this revision of fastadv carries none")
    for name, start, end in sorted(ranges, key=lambda one: (one[1], -one[2])):
        while inside and inside[-1][1] <= start:
            inside.pop()
        if inside or name == STEP:
            found[PARTS[name]] += 1e-6 * (end - start)
            if inside:
                found[inside[-1][0]] -= 1e-6 * (end - start)
            inside.append((PARTS[name], end))
    return found


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    model: Any = classifier(NETWORKS[options.model], case.vocabulary)
    closure, hot = loss_closure(model, inputs(*case)), Copy(0)
    adv = fastadv.PGD(model, steps=options.steps, scope=options.scope)
    ours = Entry(model.zero_grad, lambda: adv.backward(closure))
    by_hand = Entry(model.zero_grad, step("passes alone", f"PGD-{options.steps}", model, closure))
    parts(look(ours))  # says now if there are no ranges, and warms up, as the next does
    rounds = options.rounds * (MORE if once(ours, hot)()[1] < SHORT else 1)
    seconds = race({"step": ours, "passes_alone": by_hand}, rounds, hot).seconds
    seen = [look(ours) for _ in range(options.rounds)]
    every = [parts(one) for one in seen]
    adv.close()
    if options.trace:
        seen[-1].export_chrome_trace(str(options.trace))
    operators = [one for one in seen[-1].key_averages() if one.key.startswith("aten::")] if options.top else []
    for one in sorted(operators, key=lambda one: -one.self_cpu_time_total)[: options.top]:
        print(f"{one.self_cpu_time_total / 1e3:10.3f} ms {one.count:6} times  {one.key}")
    walls = [sum(one.values()) for one in every]
    beside = [a - b for a, b in zip(seconds["step"], seconds["passes_alone"], strict=True)]
    return {
        "case": f"{case.batch} x {case.length}, V = {case.vocabulary:,}",
        **case._asdict(),
        **{name: getattr(options, name) for name in ("model", "scope", "steps")},
        "threads": torch.get_num_threads(),
        "rounds": len(beside),
        **{name: spread(values, seconds["step"]) for name, values in seconds.items()},
        "difference": {**spread(beside, seconds["step"]), "interval_ms": [1e3 * bound for bound in interval(beside)]},
        "profiled": spread(walls, walls),
        "parts": {name: spread([one[name] for one in every], walls) for name in (*PASSES, *BESIDE)},
        "exclusive": spread([sum(one[name] for name in BESIDE) for one in every], walls),
    }


def spread(values: Sequence[float], wholes: Sequence[float]) -> dict[str, float]:
    """Milliseconds of seconds, and percent of the whole that each is of."""
    percent = median(100 * value / whole for value, whole in zip(values, wholes, strict=True))
    return {"ms": round(1e3 * median(values), 4), "iqr_ms": round(1e3 * iqr(values), 4), "percent": round(percent, 4)}


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
    """Markdown, as docs/benchmarks.md has it."""
    cases = result["cases"]
    lines = [f"| % of a step (ms) | {' | '.join(case['case'] for case in cases)} |", "|---" * (len(cases) + 1) + "|"]
    rows = {name: [case["parts"][name] for case in cases] for name in cases[0]["parts"]}
    rows["**all but the passes**, by the ranges"] = [case["exclusive"] for case in cases]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join('{percent:.2f} ({ms:,.1f})'.format(**one) for one in row)} |")
    shown = {
        "step": "the step, not profiled",
        "passes_alone": "its passes by hand",
        "difference": "**the difference**",
    }
    for name, title in shown.items():
        cells = [f"{case[name]['ms']:,.2f} ms (IQR {case[name]['iqr_ms']:,.2f})" for case in cases]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    if result["oversubscribed"]:
        lines += ["", "| threads | the step, s | attack, ms | all but the passes, ms |", "|---|---|---|---|"]
    for case in result["oversubscribed"]:
        attack, rest = case["parts"]["attack"]["ms"], case["exclusive"]["ms"]
        lines.append(f"| {case['threads']} | {case['profiled']['ms'] / 1e3:.2f} | {attack:.1f} | {rest:.1f} |")
    return "\n".join(lines)


def picture(cases: Sequence[dict[str, Any]]) -> str:
    """A bar for each case: the whole step, and what is not the model's passes on a scale of its own."""
    from fastadv.train.plots import svg

    def draw(figure: Any) -> None:
        for axes, shown in zip(figure.subplots(2, 1), ((*PASSES, *BESIDE), BESIDE), strict=True):
            left = [0.0] * len(cases)
            for name in shown:
                widths = [case["parts"][name]["percent"] for case in cases]
                axes.barh([case["case"] for case in cases], widths, 0.6, left, color=COLOURS[name], label=name)
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
    parser.add_argument("--all", action="store_true", help="the three cases of docs/benchmarks.md")
    parser.add_argument("--oversubscribed", action="store_true", help="the first case also on 1, 2, 4 and 8 threads")
    for name in ("output", "picture", "trace", "show"):  # show: the tables of an earlier output
        parser.add_argument(f"--{name}", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (5 if options.all else 7)
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
