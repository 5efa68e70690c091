"""`python -m bench.compare REF`: this working tree against a revision, case by case, in turns.

Each has a process of its own; the two never run at the same moment. A round is base, head, head, base, the next one
the other way round, so that what the machine does meanwhile meets both alike. A round's ratio is the geometric mean of
its two pairs'; the table shows the rounds' median, with its 95 % interval by bootstrap over the rounds. There is no
ratio for another answer.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.compare import build
from bench.compare.worker import Worker, compared
from bench.contest import difference
from bench.race import interval, turns

SIDES = ("base", "head")
ROUNDS, FEWEST, BUDGET = 21, 6, 90.0  # a case ends after BUDGET seconds, once it has the FEWEST rounds for a mark
HEADER = ("case", "base", "head", "head / base", "95 %", "")
LEGEND = "base, head: medians. head / base: the rounds' median; 95 %: its interval, by bootstrap over the rounds."


@dataclass
class Row:
    """One case: its seconds, both sides' in the order of the rounds, or a note that says why there are none."""

    case: str
    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    note: str = ""

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {"case": self.case, "note": self.note, "base": self.base, "head": self.head}
        if self.base and not self.note:
            each = ratios(self.base, self.head)
            low, high = interval(each)
            found |= {"ratio": median(each), "interval": [low, high], "mark": mark(low, high, len(each))}
            found |= {"base_median": median(self.base), "head_median": median(self.head)}
        return found

    def cells(self) -> tuple[str, ...]:
        found = self.figures()
        if "ratio" not in found:
            return (self.case, "", "", "", "", self.note or "interrupted")
        medians = (amount(found[f"{side}_median"]) for side in SIDES)
        low, high = found["interval"]
        return (self.case, *medians, f"{found['ratio']:.3f}", f"{low:.3f} to {high:.3f}", found["mark"])


def ratios(base: Sequence[float], head: Sequence[float]) -> list[float]:
    """Head over base, round by round: of two runs each, the geometric mean."""
    pairs = [math.log(one / other) for one, other in zip(head, base, strict=True)]
    return [math.exp((pairs[at] + pairs[at + 1]) / 2) for at in range(0, len(pairs), 2)]


def mark(low: float, high: float, rounds: int) -> str:
    if rounds < FEWEST:
        return "too few rounds"
    return "slower" if low > 1 else "faster" if high < 1 else "same"


def amount(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 1:
            return f"{seconds * scale:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def compare(row: Row, workers: Mapping[str, Worker], rounds: int | None) -> None:
    """Fill a row, round by round, so that an interrupt leaves what there is.

    Both make the case anew for every round: the pages that it happens to get decide about its time, sometimes by half,
    and would pass for a difference between the revisions. The side in the middle runs twice in a row, which is worth
    a few per cent to it: every other round has the other one there. The first round warms up.
    """
    start = time.perf_counter()
    for number, order in turns(SIDES, rounds or ROUNDS, warmup=1, back=True):
        row.note = prepare(row.case, {side: workers[side] for side in order[:2]}, compare=number < 0)
        seconds: dict[str, list[float]] = {"base": [], "head": []}
        for side in () if row.note else order:
            reply = workers[side].ask("run")
            row.note = row.note or (f"{side} fails: {reply['error']}" if "error" in reply else "")
            seconds[side].append(reply.get("seconds", math.nan))
        if row.note:
            return
        if number >= 0:
            row.base += seconds["base"]
            row.head += seconds["head"]
        if not rounds and number + 1 >= FEWEST and time.perf_counter() - start > BUDGET:
            return


def prepare(case: str, workers: Mapping[str, Worker], *, compare: bool) -> str:
    """Let both make a case; what stands in the way of timing it, if anything does."""
    replies = {side: worker.ask("prepare", case=case, compare=compare) for side, worker in workers.items()}
    lacking = {side: reply["error"] for side, reply in replies.items() if "error" in reply}
    if lacking or not compare:
        return "; ".join(f"not there in {side}: {error}" for side, error in lacking.items())
    base, head = (torch.load(replies[side]["answer"]) for side in SIDES)
    apart = max(map(difference, head, base), default=0.0) if len(base) == len(head) else math.inf
    tolerance = replies["base"]["tolerance"]
    return "" if apart <= tolerance else f"differs by {apart:.1e} (may by {tolerance:g})"


def race(rows: list[Row], sides: dict[str, dict[str, Any]], names: Sequence[str], options: Any) -> None:
    """Compare case after case. What there is so far is in `rows`, and what the processes are in `sides`."""
    builds = {"base": build.revision(options.base), "head": build.working_tree()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-compare-")))
        workers: dict[str, Worker] = {}
        for side, built in builds.items():
            workers[side] = Worker(side, built, folder, options.threads)
            stack.callback(workers[side].close)
            sides[side] = {"name": built.name, "commit": built.commit, **(workers[side].found or {})}
        for number, name in enumerate(names, 1):
            rows.append(Row(name))
            compare(rows[-1], workers, options.rounds)
            shown = " | ".join(filter(None, rows[-1].cells()))
            print(f"{number} of {len(names)}: {shown}", file=sys.stderr, flush=True)


def report(rows: Sequence[Row], sides: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *figures, last in lines:
        cells = [first.ljust(widths[0]), *map(str.rjust, figures, widths[1:]), last]
        text.append("  ".join(cells).rstrip())
    return "\n".join([*(f"{side}: {found['name']}" for side, found in sides.items()), "", *text, "", LEGEND])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", nargs="?", default="HEAD", help="a revision of git; default: HEAD")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="cases to compare")
    parser.add_argument("--rounds", type=int, help=f"of every case; default: {ROUNDS}, or {BUDGET:.0f} seconds' worth")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write everything")
    parser.add_argument("--list", action="store_true", help="only say which cases there are")
    options = parser.parse_args(arguments)
    names = [name for name in compared() if options.only.search(name)]
    if not names:
        parser.error(f"no case matches {options.only.pattern!r}: --list names them")
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.list:
        print("\n".join(names))
        return 0
    rows, sides, code = list[Row](), dict[str, dict[str, Any]](), 0
    try:
        race(rows, sides, names, options)
    except build.RevisionError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    if rows:
        print(report(rows, sides))
    if rows and options.json:
        kept = {**sides, "cores": os.cpu_count(), "cases": [row.figures() for row in rows]}
        options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill leaves no more behind than Ctrl-C does
    sys.exit(main())
