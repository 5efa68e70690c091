"""Everything that needs this machine's GPU, in two commands that each end within their budget and can run again.

`tests` builds the extension, and runs the tests and the sanitizers; `figures` builds it, and measures. Both add to
one file of results, bench/results/<gpu>.json, and keep what was printed in build/gpu-check/logs; `--out` names another
folder for both. What failed is printed at the end.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu import figures, here, install, results, stages
from bench.gpu.workers import ROOT

BUDGET, BUILDING = 420.0, 240.0  # seconds; beyond the budget lies only the end of what was running
WORK = Path("build/gpu-check")
DETAILED, SHOWN, LISTED = 5, 25, 40  # failures that are shown with so many lines each, and failures that are named


def main() -> int:
    """0 if everything ran, and passed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("what", choices=("tests", "figures"))
    parser.add_argument("paths", nargs="*", help="tests: these files in place of all")
    parser.add_argument("--out", type=Path, help="where results and logs go")
    parser.add_argument("--budget", type=float, default=BUDGET, help=f"seconds for all of it (default: {BUDGET:.0f})")
    parser.add_argument("--rehearse", action="store_true", help="a few tests, tiny figures, on the CPU: does it run?")
    parser.add_argument("--limit", type=float, help="tests: seconds for each (default: 60, and 120 under a sanitizer)")
    parser.add_argument("--rows", default=figures.ROWS, help="figures: MODULE:FUNCTION that lists them")
    options = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and so what was started is ended
    end = time.monotonic() + options.budget
    out = options.out or ROOT / WORK
    logs = (out / "logs").resolve()
    logs.mkdir(parents=True, exist_ok=True)
    machine = here.ask()
    if not (machine["gpu"] or options.rehearse):
        print(
            f"there is nothing to check: {machine.get('problem') or 'torch sees no CUDA device'} (--rehearse: the CPU)"
        )
        return 2
    problem = None if options.rehearse else build(machine, logs / "build.txt", end)
    kept = ROOT / "bench/results" if options.out is None and not options.rehearse else out
    path = results.place(kept, None if options.rehearse else machine["gpu"])
    results.keep(path, gpu=machine["gpu"] or "none")
    by = {name: machine.get(name) for name in ("torch", "cuda", "triton", "python")}
    by |= {"commit": here.commit(), "build_problem": problem}
    failed = (tests if options.what == "tests" else measures)(options, by, logs, path, end) or problem is not None
    print(f"\n{problem or ''}\n{'NOT GOOD' if failed else 'good'}: {path}, {logs}")
    return 1 if failed else 0


def build(machine: Mapping[str, Any], log: Path, end: float) -> str | None:
    """Why not every op has its kernel, and what to do, or None. What needs none goes on all the same."""
    if wanted := install.needed(machine):
        problem = install.build(wanted, log, min(BUILDING, end - time.monotonic()))
        if problem:
            print(*log.read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN:], sep="\n")
            return f"{problem}. {install.advice(machine) or ''}"
        machine = here.ask()
    lacking = machine.get("missing", {"all ops": machine.get("problem")})
    return "; ".join(f"no kernel for {op}: {why}" for op, why in lacking.items()) or None


def tests(options: argparse.Namespace, by: Mapping[str, Any], logs: Path, path: Path, end: float) -> bool:
    """Run them, and print last what failed, since the end is what is read first."""
    if options.paths:
        chosen = {"given": stages.Stage([str(Path(one).resolve()) for one in options.paths], 2)}
    else:
        chosen = stages.rehearsal() if options.rehearse else stages.stages()
    if options.limit:
        chosen = {name: stage._replace(limit=options.limit) for name, stage in chosen.items()}

    def keep(found: Mapping[str, Mapping[str, Any]]) -> None:
        totals = {kind: sum(one[kind] for one in found.values()) for kind in ("passed", "failed", "skipped", "not_run")}
        results.keep(path, tests={**by, **totals, "stages": found})

    found = stages.run_all(chosen, logs, end, keep)
    failures = [(f"{name}: {test}", text) for name, one in found.items() for test, text in one["failures"].items()]
    for name, text in failures[:DETAILED]:
        print(f"\n--- {name}", *text.splitlines()[-SHOWN:], sep="\n")
    results.table("tests", {name: {key: one[key] for key in one if key != "failures"} for name, one in found.items()})
    bad = [name for name, one in found.items() if not stages.good(one)]
    if failures:
        print(f"\n{len(failures)} failed, told in full in {path}:")
    for name, text in failures[:LISTED]:
        lines = text.strip().splitlines() or [""]
        print(f"  {name}: {next((line for line in lines if line.startswith('E ')), lines[-1])[:120]}")
    return bool(bad)


def measures(options: argparse.Namespace, by: Mapping[str, Any], logs: Path, path: Path, end: float) -> bool:
    """Measure, and print last what failed."""
    device = "cpu" if options.rehearse else "cuda"
    found = figures.run(options.rows, device, logs, end, lambda rows: results.keep(path, figures={**by, **rows}))
    for section, rows in found.items():
        results.table(section, {name: row for name, row in rows.items() if "failed" not in row})
    bad = {
        f"{section}: {name}": row for section, rows in found.items() for name, row in rows.items() if "failed" in row
    }
    if bad:
        results.table("failed", bad)
    return bool(bad) or not found


if __name__ == "__main__":
    sys.exit(main())
