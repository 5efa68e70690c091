"""`make campaign`: all campaigns, or a share of them. Prints the table, keeps it, and fails if anything is wrong."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.campaigns import runner, table
from tests.campaigns.catalogue import CAMPAIGNS
from tests.campaigns.result import Result, read

WHOLE = runner.ROOT / "docs/results/reliability.json"
PAGE = runner.ROOT / "docs/reliability.md"
BUILD = runner.ROOT / "build/campaign"


def main(
    share: Annotated[float, typer.Option(help="Of the whole campaign's cases.", min=0.0, max=1.0)] = 1.0,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(CAMPAIGNS)}; may be repeated.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where the results go; of the whole campaign: docs/.")] = None,
    processes: Annotated[int, typer.Option(help="Side by side; 0: one for each core.", min=0)] = 0,
    fresh: Annotated[bool, typer.Option(help="Forget what an interrupted campaign has finished.")] = False,
) -> None:
    """Try to break what fastadv promises."""
    names = only or list(CAMPAIGNS)
    unknown = [name for name in names if name not in CAMPAIGNS]
    if unknown:
        raise typer.BadParameter(f"no campaign {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")
    revision = _revision()
    kept = BUILD / f"{revision}-{share:g}-{seed}.json"
    if fresh:
        kept.unlink(missing_ok=True)
    found = _run(runner.parts(names, share, seed), kept, processes or os.cpu_count() or 1)
    results = {**_about(revision, share, seed), "rows": [_row(name, found[name]) for name in names]}
    whole = share == 1 and not only
    target = output or (WHOLE if whole else BUILD / "results.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(results, indent=1, sort_keys=False) + "\n")
    if target.resolve() == WHOLE.resolve():
        table.write(PAGE, results)
    _show(results, target)
    raise typer.Exit(any(row["wrong"] for row in results["rows"]))


def _run(parts: list[runner.Part], kept: Path, processes: int) -> dict[str, Result]:
    found = {part.name: Result() for part in parts}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("cases", total=sum(part.count for part in parts))
        for part, result in runner.run(parts, kept, processes):
            found[part.name].add(read(result))
            wrong = sum(sum(one.wrong.values()) for one in found.values())
            progress.update(task, advance=part.count, description=f"{part.name}, {wrong} wrong so far")
    return found


def _row(name: str, found: Result) -> dict[str, Any]:
    return {"name": name, "title": CAMPAIGNS[name].title, **found.as_json()}


def _about(revision: str, share: float, seed: int) -> dict[str, Any]:
    import numpy as np
    import torch

    from bench.machine import describe

    here = describe()
    return {
        "revision": revision,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "machine": f"{here['processor']}, {here['cores']} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "share": share,
        "seed": seed,
    }


def _revision() -> str:
    """The commit, and a mark where files differ from it."""
    git = ["git", "-C", str(runner.ROOT)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def _show(results: dict[str, Any], target: Path) -> None:
    shown = Table(*table.HEAD)
    for row in results["rows"]:
        shown.add_row(*table.cells(row))
    console = Console()
    console.print(shown)
    for row in results["rows"]:
        for detail in row["details"][:10]:
            console.print(f"{row['name']}: {detail}", markup=False, highlight=False)
    console.print(f"kept in {target}", markup=False)


if __name__ == "__main__":
    typer.run(main)
