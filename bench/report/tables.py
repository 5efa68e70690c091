"""The figures as text: Markdown for a page, CSV for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from bench.race import LIMIT
from bench.report.condense import OURS, Rows

HEAPS = {"users": "heap as users have it", "retained": "heap retained"}
MEMORY = {
    "peak_mib": "peak, MiB",
    "over_plain_mib": "over plain, MiB",
    "over_plain_perturbations": "in perturbation-sized buffers",
    "over_inputs_mib": "over what is there before, MiB",
    "over_inputs_logits": "in tensors like the logits",
}
COLUMNS = ("group", "heap", "contestant", "median_seconds", "iqr_seconds", "rounds", "over_fused", "of_limit")
MORE = ("copy_bandwidth", "bytes", "gbps", "of_copy", "peak_mib", "axis", "value")


def markdown(condensed: Mapping[str, Any]) -> str:
    """The machine, and a table per group with the heaps side by side."""
    machine = condensed["machine"]
    copies = [row["copy_bandwidth"] for row in _rows(condensed) if row.get("copy_bandwidth")]
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


def comma_separated(condensed: Mapping[str, Any]) -> str:
    """A row for every contestant of every group and heap."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*COLUMNS, *MORE])
    for group, heaps in condensed["groups"].items():
        for heap, rows in heaps.items():
            for contestant, row in rows.items():
                times = [row["median"], row["iqr"], row["rounds"], row.get("over_fused"), row.get("of_limit")]
                writer.writerow([group, heap, contestant, *times, *(row.get(name) for name in MORE)])
    return file.getvalue()


def _rows(condensed: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [row for heaps in condensed["groups"].values() for rows in heaps.values() for row in rows.values()]


def _time_table(heaps: Mapping[str, Rows]) -> list[str]:
    limited = any(LIMIT in rows for rows in heaps.values())
    weighed = any("peak_mib" in row for rows in heaps.values() for row in rows.values())
    head = ["contestant"]
    for heap in heaps:
        head += [f"{HEAPS[heap]}: median (IQR)", "times fused", *(["of the limit"] if limited else [])]
    lines = [_line([*head, *(["memory, MiB"] if weighed else [])])]
    lines.append(_line(["---"] * (len(head) + weighed)))
    for contestant in dict.fromkeys(name for rows in heaps.values() for name in rows):
        cells = [f"**{contestant}**" if contestant == OURS else contestant]
        for rows in heaps.values():
            row = rows.get(contestant, {})
            cells += [_time(row), f"{row['over_fused']:.2f}" if "over_fused" in row else ""]
            cells += ([f"{row['of_limit']:.0%}" if "of_limit" in row else ""]) if limited else []
        peaks = [rows[contestant]["peak_mib"] for rows in heaps.values() if "peak_mib" in rows.get(contestant, {})]
        cells += [f"{peaks[0]:,.1f}" if peaks else ""] if weighed else []
        lines.append(_line(cells))
    return lines


def _time(row: Mapping[str, Any]) -> str:
    if not row:
        return ""
    scale, unit = (1e3, "ms") if row["median"] < 1 else (1, "s")
    return f"{row['median'] * scale:.3g} {unit} ({row['iqr'] * scale:.2g})"


def _memory_table(heaps: Mapping[str, Rows]) -> list[str]:
    measured = [figure for figure in MEMORY if any(figure in row for rows in heaps.values() for row in rows.values())]
    head = ["contestant", *(MEMORY[figure] for figure in measured)]
    lines = [_line(head), _line(["---"] * len(head))]
    for rows in heaps.values():
        lines += [_line([name, *(f"{row[figure]:,.1f}" for figure in measured)]) for name, row in rows.items()]
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
