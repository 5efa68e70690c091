"""Tests, sanitizers and figures of this machine's GPU: prints tables, and keeps bench/results/<gpu>.json."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.gpu import ops, stages, steps
from bench.gpu.clock import device_race
from bench.race import Copy, Entry

RESULTS = Path(__file__).parents[1] / "results"
COPIED = {"full": 128 << 20, "tiny": 1 << 16}  # float32 elements: 512 MB
ROUNDS = {"full": 21, "tiny": 1}
TESTS_LIMIT = 300.0  # seconds; what is left of ten minutes is for installing and for the figures


def main() -> int:
    """0 if everything passed and no step waited for the device."""
    options = _options()
    if not (torch.cuda.is_available() or options.rehearse):
        print("torch sees no CUDA device: there is nothing to check. (--rehearse runs the figures' code on the CPU)")
        return 2
    device = torch.device("cpu" if options.rehearse else "cuda")
    found: dict[str, Any] = {**stages.versions(), "commit": _commit()}
    counts = {} if options.rehearse else stages.run_all(TESTS_LIMIT)
    found["tests"] = {
        kind: sum(getattr(one, kind) for one in counts.values()) for kind in ("passed", "failed", "skipped")
    }
    found["stages"] = {name: count._asdict() for name, count in counts.items()}
    found["syncs"] = stages.syncs()
    _table("tests", found["stages"])
    keep(found, options.out)
    for section in figures(found, "tiny" if options.rehearse else "full", device):
        _table(section, found[section])
        keep(found, options.out)
    good = all(count.good for count in counts.values()) and not found["syncs"]
    print(f"{'good' if good else 'NOT GOOD'}: {found['tests']}, syncs in a step: {found['syncs']}")
    return 0 if good else 1


def figures(found: dict[str, Any], size: str, device: torch.device) -> Iterable[str]:
    """Fill in section after section."""
    copy, rounds = Copy(COPIED[size], device), ROUNDS[size]
    found["copy_gbps"] = round(device_race({"copy": Entry(lambda: None, copy)}, rounds, copy).bandwidth / 1e9, 1)
    sections = {
        "ops": ops.measured(ops.SIZES[size], device, copy, rounds),
        "attack_step": steps.attack_steps(steps.SIZES[size], device, copy, rounds),
        "training_step": steps.training_steps(steps.SIZES[size], device, copy, min(rounds, 11)),
    }
    for section, rows in sections.items():
        found[section] = {}
        for name, row in rows:
            found[section][name] = row
        yield section


def keep(found: Mapping[str, Any], folder: Path) -> Path:
    """Write what there is so far, beside what `bench.report` keeps of the same GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.slug(str(found['gpu']))}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    reported = {name: before[name] for name in ("machine", "runs", "groups") if name in before}
    path.write_text(json.dumps({**found, **reported}, indent=1) + "\n", encoding="utf-8")
    return path


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (default: bench/results)")
    parser.add_argument(
        "--rehearse", action="store_true", help="no tests; tiny figures on the CPU, to see that all runs"
    )
    return parser.parse_args()


def _commit() -> str | None:
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """One line for each row, of what is a number or a word."""
    print(f"\n{title}")
    for name, row in rows.items():
        cells = (
            f"{key} {value:,}" if isinstance(value, (int, float)) else f"{key} {value}" for key, value in row.items()
        )
        print(f"  {name:34} {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
