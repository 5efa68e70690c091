"""A run's report: `python -m bench.report users.json retained.json [--write]`.

It prints a table of every group. With `--write` it also keeps the run: bench/results/cpu.json, docs/benchmarks.md
(between its markers) and docs/results/benchmarks.svg.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- results: written by bench/report.py -->", "<!-- end of results -->"
OURS, LIMIT = "fastadv", "physical limit"
MACHINE = ("processor", "cores", "threads", "torch", "python", "libc", "size")
MEMORY = {
    "peak_mib": "peak, MiB",
    "over_plain_mib": "over plain, MiB",
    "over_plain_perturbations": "in perturbation-sized buffers",
    "over_inputs_mib": "over what is there before, MiB",
    "over_inputs_logits": "in tensors like the logits",
}
HEAPS = {"users": "heap as users have it", "retained": "heap retained"}
COLOURS = {
    "classic script": "#6b7280",
    "plain, index_add": "#0e7490",
    "textbook": "#6b7280",
    "plain, autograd": "#0e7490",
    "plain PyTorch": "#c2410c",
    "torch.compile": "#a16207",
    "plain": "#9ca3af",
}

Groups = dict[str, dict[str, dict[str, dict[str, Any]]]]  # group, heap, contestant -> figures


def condense(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of pytest-benchmark's files: the machine, and each contestant's median, IQR and ratios."""
    machines = [{name: bench["extra_info"][name] for name in MACHINE} for run in runs for bench in run["benchmarks"]]
    if not machines:
        raise ValueError("no benchmarks in these files")
    if any(machine != machines[0] for machine in machines):
        raise ValueError("these files come from different machines or settings: ratios across them mean nothing")
    groups: Groups = {}
    for run in runs:
        for bench in run["benchmarks"]:
            info = bench["extra_info"]
            heap = groups.setdefault(bench["group"], {}).setdefault(info["heap"], {})
            heap[info["contestant"]] = _figures(bench["stats"], info)
    for heaps in groups.values():
        for rows in heaps.values():
            _add_ratios(rows)
    commits = {(run.get("commit_info") or {}).get("id") for run in runs}
    commit = ", ".join(sorted(commit[:10] for commit in commits if commit)) or None
    run = {"date": runs[0].get("datetime"), "commit": commit, "groups": list(groups)}
    return {"machine": machines[0], "runs": [run], "groups": groups}


def _figures(stats: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    found = {"median": stats["median"], "iqr": stats["iqr"], "rounds": stats["rounds"]}
    if "copy_bandwidth" in info:
        found["copy_bandwidth"] = info["copy_bandwidth"]
    return {**found, **{name: info[name] for name in MEMORY if name in info}}


def _add_ratios(rows: dict[str, dict[str, Any]]) -> None:
    for row in rows.values():
        if OURS in rows:
            row["over_fastadv"] = row["median"] / rows[OURS]["median"]
        if LIMIT in rows:
            row["of_limit"] = rows[LIMIT]["median"] / row["median"]


def markdown(condensed: dict[str, Any]) -> str:
    """The machine, and a table per group with the heaps side by side."""
    machine = condensed["machine"]
    copies = [row["copy_bandwidth"] for row in _rows(condensed) if "copy_bandwidth" in row]
    bandwidth = f"; a large copy moves {min(copies) / 1e9:.1f} to {max(copies) / 1e9:.1f} GB/s" if copies else ""
    setup = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, {machine['libc']}"
    lines = [f"{setup}{bandwidth}. Size `{machine['size']}`.", ""]
    for run in condensed["runs"]:
        part = "" if len(condensed["runs"]) == 1 else f": {'; '.join(run['groups'])}"
        lines.append(f"- {run['date'] or 'no date'}, commit {run['commit'] or 'unknown'}{part}")
    for name, heaps in condensed["groups"].items():
        table = _memory_table(heaps) if name.startswith("peak memory") else _time_table(heaps)
        lines += ["", f"### {name[0].upper()}{name[1:]}", "", *table]
    return "\n".join(lines) + "\n"


def _rows(condensed: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for heaps in condensed["groups"].values() for rows in heaps.values() for row in rows.values()]


def _time_table(heaps: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    limited = any(LIMIT in rows for rows in heaps.values())
    head = ["contestant"]
    for heap in heaps:
        head += [f"{HEAPS[heap]}: median (IQR)", "times fastadv", *(["of the limit"] if limited else [])]
    lines = [_line(head), _line(["---"] * len(head))]
    for contestant in dict.fromkeys(name for rows in heaps.values() for name in rows):
        cells = [f"**{contestant}**" if contestant == OURS else contestant]
        for rows in heaps.values():
            row = rows.get(contestant, {})
            cells += [_time(row), f"{row['over_fastadv']:.2f}" if "over_fastadv" in row else ""]
            cells += ([f"{row['of_limit']:.0%}" if "of_limit" in row else ""]) if limited else []
        lines.append(_line(cells))
    return lines


def _time(row: dict[str, Any]) -> str:
    if not row:
        return ""
    scale, unit = (1e3, "ms") if row["median"] < 1 else (1, "s")
    return f"{row['median'] * scale:.3g} {unit} ({row['iqr'] * scale:.2g})"


def _memory_table(heaps: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    measured = [figure for figure in MEMORY if any(figure in row for rows in heaps.values() for row in rows.values())]
    head = ["contestant", *(MEMORY[figure] for figure in measured)]
    lines = [_line(head), _line(["---"] * len(head))]
    for rows in heaps.values():
        lines += [_line([name, *(f"{row[figure]:,.1f}" for figure in measured)]) for name, row in rows.items()]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def picture(condensed: dict[str, Any]) -> str:
    """Every contestant's time over fastadv's, group by group, with the heap as users have it: SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib.figure import Figure

    from fastadv.train.plots import STYLE

    groups = {name: heaps["users"] for name, heaps in condensed["groups"].items() if "users" in heaps}
    timed = {name: rows for name, rows in groups.items() if OURS in rows and not name.startswith("peak memory")}
    with mpl.rc_context({**STYLE, "svg.hashsalt": "benchmarks"}):
        figure = Figure(figsize=(8.4, 0.9 + 0.34 * len(timed)), layout="constrained")
        axes = figure.add_subplot()
        for contestant, colour in COLOURS.items():
            found = [
                (rows[contestant]["over_fastadv"], y) for y, rows in enumerate(timed.values()) if contestant in rows
            ]
            if found:
                axes.scatter(*zip(*found, strict=True), color=colour, s=32, label=contestant, zorder=3)
        axes.axvline(1, color="#1d5fbf", lw=2, label=OURS)
        axes.set_yticks(range(len(timed)), list(timed))
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("median time over fastadv's (log scale); right of the line is slower")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def between_markers(page: str, text: str) -> str:
    """`page` with what stands between its markers replaced by `text`."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def merged(kept: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What is kept of earlier runs on the same machine, with the groups of a new one in their place."""
    if kept["machine"] != new["machine"]:
        return new
    runs = [{**run, "groups": [name for name in run["groups"] if name not in new["groups"]]} for run in kept["runs"]]
    runs = [*(run for run in runs if run["groups"]), *new["runs"]]
    return {"machine": new["machine"], "runs": runs, "groups": {**kept["groups"], **new["groups"]}}


def write(condensed: dict[str, Any], root: Path = ROOT) -> None:
    """Keep a run in the repository, beside the groups of earlier ones that it has not. A tiny one is not worth it."""
    heaps = {heap for found in condensed["groups"].values() for heap in found}
    if condensed["machine"]["size"] != "minilm" or heaps != set(HEAPS):
        raise ValueError("not kept: only a run of size minilm with both heaps is")
    results, page = root / "bench/results/cpu.json", root / "docs/benchmarks.md"
    results.parent.mkdir(exist_ok=True)
    if results.exists():
        condensed = merged(json.loads(results.read_text(encoding="utf-8")), condensed)
    results.write_text(json.dumps(condensed, indent=1) + "\n", encoding="utf-8")
    (root / "docs/results/benchmarks.svg").write_text(picture(condensed), encoding="utf-8")
    text = f"![Times over fastadv's](results/benchmarks.svg)\n\n{markdown(condensed)}"
    page.write_text(between_markers(page.read_text(encoding="utf-8"), text), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="pytest-benchmark's JSON, one per heap")
    parser.add_argument("--write", action="store_true", help="keep the run in bench/results and docs")
    options = parser.parse_args(arguments)
    condensed = condense([json.loads(file.read_text(encoding="utf-8")) for file in options.files])
    print(markdown(condensed))
    if not options.write:
        return
    try:
        write(condensed)
    except ValueError as error:
        print(error)


if __name__ == "__main__":
    main()
