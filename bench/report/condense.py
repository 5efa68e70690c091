"""What is kept of pytest-benchmark's files: the machine, and each contestant's median, spread and ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.machine import SAME
from bench.race import LIMIT

OURS = "fused"
MEMORY = ("peak_mib", "over_plain_mib", "over_plain_perturbations", "over_inputs_mib", "over_inputs_logits")
KEPT = ("copy_bandwidth", "shape", "bytes", "gbps", "of_copy", "axis", "value", *MEMORY)
Rows = dict[str, dict[str, Any]]  # contestant -> figures
Groups = dict[str, dict[str, Rows]]  # group, heap


def condense(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One dictionary for all files."""
    machines = [{name: bench["extra_info"][name] for name in SAME} for run in runs for bench in run["benchmarks"]]
    if not machines:
        raise ValueError("no benchmarks in these files")
    if any(machine != machines[0] for machine in machines):
        raise ValueError("these files come from different machines or settings: ratios across them mean nothing")
    groups: Groups = {}
    for run in runs:
        for bench in run["benchmarks"]:
            info = bench["extra_info"]
            rows = groups.setdefault(bench["group"], {}).setdefault(info["heap"], {})
            figures = {name: bench["stats"][name] for name in ("median", "iqr", "rounds")}
            rows[info["contestant"]] = {**figures, **{name: info[name] for name in KEPT if name in info}}
    for heaps in groups.values():
        for rows in heaps.values():
            _add_ratios(rows)
    commits = {(run.get("commit_info") or {}).get("id") for run in runs}
    commit = ", ".join(sorted(commit[:10] for commit in commits if commit)) or None
    return {
        "machine": machines[0],
        "runs": [{"date": runs[0].get("datetime"), "commit": commit, "groups": list(groups)}],
        "groups": groups,
    }


def _add_ratios(rows: Rows) -> None:
    for row in rows.values():
        if OURS in rows:
            row["over_fused"] = row["median"] / rows[OURS]["median"]
        if LIMIT in rows:
            row["of_limit"] = rows[LIMIT]["median"] / row["median"]


def merged(kept: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of earlier runs on the same machine, with the groups of a new one in their place.

    Runs of other versions on that machine are never beside each other: the new one is all that stays then.
    """
    if kept.get("machine") != new["machine"]:
        return {**kept, **new}
    runs = [{**run, "groups": [name for name in run["groups"] if name not in new["groups"]]} for run in kept["runs"]]
    runs = [*(run for run in runs if run["groups"]), *new["runs"]]
    return {**kept, "machine": new["machine"], "runs": runs, "groups": {**kept["groups"], **new["groups"]}}
