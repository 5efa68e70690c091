"""A campaign's results as the table that the page shows, and where the page has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DONE = ("as done", "after the step", "when let go")
HEAD = ("campaign", "cases", "as before", "as done", "wrong")
BEGIN, END = "<!-- campaign: written by `make campaign` -->", "<!-- /campaign -->"


def cells(row: dict[str, Any]) -> list[str]:
    """One campaign: its title, cases, how they ended, and each kind of violation with its number."""
    outcomes = row["outcomes"]
    before, done = outcomes.get("as before"), sum(outcomes.get(kind, 0) for kind in DONE)
    wrong = ", ".join(f"{count:,} {kind}" for kind, count in row["wrong"].items() if count)
    shown = ["" if before is None else f"{before:,}", f"{done:,}" if before is not None else ""]
    return [row["title"], f"{row['cases']:,}", *shown, wrong or "0"]


def markdown(results: dict[str, Any]) -> str:
    lines = [HEAD, tuple("---" for _ in HEAD), *(cells(row) for row in results["rows"])]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def after_all(results: dict[str, Any]) -> tuple[int, int]:
    """Of the SIGINTs from another process that raised: those after which the step was done all the same, and all."""
    rows = [row["outcomes"] for row in results["rows"] if row["name"] in ("sigints", "storms")]
    late = sum(outcomes.get("as done", 0) for outcomes in rows)
    return late, late + sum(outcomes.get("as before", 0) for outcomes in rows)


def section(results: dict[str, Any]) -> str:
    """What stands on the page between the two marks."""
    late, raised = after_all(results)
    share = f"{late:,} of {raised:,} ({100 * late / raised:.1f} %)" if raised else "none"
    part = "" if results["share"] == 1 else f"A share of {results['share']:g} of the campaign. "
    made = (
        f"{part}At revision {results['revision']}, {results['date']}, {results['machine']}, torch {results['torch']}."
    )
    rate = f"KeyboardInterrupts that came when the step was done: {share}."
    return f"{BEGIN}\n\n{markdown(results)}\n\n{made}\n{rate}\n\n{END}"


def write(page: Path, results: dict[str, Any]) -> None:
    """Put the table into the page."""
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    page.write_text(pattern.sub(lambda _: section(results), page.read_text()))
