"""Tests, sanitizers and figures of this machine's GPU: prints tables, and keeps bench/results/<gpu>.json."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fastadv
from bench import machine, memory
from bench.cases import op_cases, pgd_cases
from bench.contest import Case, Field, check
from bench.gpu import stages
from bench.race import Copy, Entry, captured, nothing, race
from bench.workloads import MAIN, SIZES

RESULTS = Path(__file__).parents[1] / "results"
TESTS_LIMIT = 300.0  # seconds; what is left of ten minutes is for installing and for the figures
ATTACK = "attack step, table scope, "
Measure = Callable[[Field, int, Copy], dict[str, Any]]


def main() -> int:
    """0 if everything passed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go (default: bench/results)")
    parser.add_argument("--rehearse", action="store_true", help="no tests; tiny figures, on the CPU: does it run?")
    options = parser.parse_args()
    if not (torch.cuda.is_available() or options.rehearse):
        print("torch sees no CUDA device: there is nothing to check. (--rehearse runs the figures' code on the CPU)")
        return 2
    counts = {} if options.rehearse else stages.run_all(TESTS_LIMIT)
    kinds = ("passed", "failed", "skipped")
    found = {**versions(), "tests": {kind: sum(getattr(one, kind) for one in counts.values()) for kind in kinds}}
    found["stages"] = {name: count._asdict() for name, count in counts.items()}
    _table("tests", found["stages"])
    keep(found, options.out)
    for section in figures(found, "cpu" if options.rehearse else "cuda"):
        _table(section, found[section])
        keep(found, options.out)
    good = all(count.good for count in counts.values())
    print(f"{'good' if good else 'NOT GOOD'}: {found['tests']}")
    return 0 if good else 1


def figures(found: dict[str, Any], device: str) -> Iterator[str]:
    """Fill in section after section: ops and training steps at the GPU's size, attack steps at the usual one."""
    large, usual = (SIZES["gpu"], SIZES["full"]) if device == "cuda" else (SIZES["rehearsal"], SIZES["tiny"])
    copy, rounds = Copy(large.copy, device), (21 if device == "cuda" else 1)
    found["copy_gbps"] = round(race({"copy": Entry(nothing, copy)}, rounds, copy).bandwidth / 1e9, 1)
    attacks = op_cases(usual, device)
    sections: dict[str, tuple[Measure, Mapping[str, Case], int]] = {
        "ops": (op, op_cases(large, device), rounds),
        "attack_step": (attack_step, {f"{ATTACK}{model}": attacks[f"{ATTACK}{model}"] for model in MAIN}, rounds),
        "training_step": (training_step, pgd_cases(large, device), min(rounds, 11)),
    }
    for section, (measure, cases, times) in sections.items():
        found[section] = {}
        for name, case in cases.items():
            torch._dynamo.reset()
            gc.collect()
            found[section][name] = measure(case.make(), times, copy)
        yield section


def op(field: Field, rounds: int, copy: Copy) -> dict[str, Any]:
    """At a size that no cache holds, in bfloat16, against the copy of the same run."""
    result = race({"fused": captured(field.entries["fused"])}, rounds, copy)
    return {"us": result.microseconds["fused"], **result.speed("fused", field.moved or 0)}


def attack_step(field: Field, rounds: int, copy: Copy) -> dict[str, Any]:
    """From dE to the next forward's E in float32, everyone as a graph that can be."""
    check(field)
    return race({name: captured(entry) for name, entry in field.entries.items()}, rounds, copy).microseconds


def training_step(field: Field, rounds: int, copy: Copy) -> dict[str, Any]:
    """PGD-3 under bfloat16 autocast, host included."""
    check(field)
    found = race(field.entries, rounds, copy).microseconds
    beside = round((found["fused"] - found["passes alone"]) / found["fused"], 4)
    peaks = memory.peaks(field.entries, copy.source.device.type)
    in_mib = {name: round(peak / memory.MIB, 1) for name, peak in peaks.items()}
    return {**found, "beside_the_passes": beside, "peak_mib": in_mib}


def keep(found: Mapping[str, Any], folder: Path) -> Path:
    """Write what there is so far, beside what `bench.report` keeps of the same GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{machine.slug(str(found['gpu']))}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    reported = {name: before[name] for name in ("machine", "runs", "groups") if name in before}
    path.write_text(json.dumps({**found, **reported}, indent=1) + "\n", encoding="utf-8")
    return path


def versions() -> dict[str, Any]:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    triton = getattr(importlib.import_module("triton"), "__version__", None) if find_spec("triton") else None
    found = {"gpu": gpu, "torch": torch.__version__, "triton": triton, "fastadv": fastadv.__version__}
    return {**found, "commit": git.stdout.strip() or None}


def _table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    print(f"\n{title}")
    for name, row in rows.items():
        cells = (f"{key} {value:,}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
        print(f"  {name:44} {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
