"""Runs parts side by side, each in a process of its own; what is finished stays, so that a campaign can go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from tests.campaigns.catalogue import CAMPAIGNS
from tests.campaigns.result import Result, read

ROOT = Path(__file__).parent.parent.parent
LIMIT = 1800  # seconds that a part may take


class Part(NamedTuple):
    name: str
    index: int
    count: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.name} {self.index} {self.count} {self.seed}"


def parts(names: list[str], share: float, seed: int) -> list[Part]:
    """The longest campaigns' parts come in turn with the others', so that all of them advance."""
    found: list[tuple[float, Part]] = []
    for name in names:
        campaign = CAMPAIGNS[name]
        left = max(1, round(campaign.total * share))
        count = -(-left // campaign.portion)
        for index in range(count):
            size = min(campaign.portion, left)
            left -= size
            found.append((index / count, Part(name, index, size, seed + 1000 * index)))
    return [part for _, part in sorted(found, key=lambda one: one[0])]


def run(todo: list[Part], kept: Path, processes: int) -> Iterator[tuple[Part, dict[str, Any]]]:
    """Each part with what it found; what `kept` has from an earlier run is not run again."""
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    for part in todo:
        if part.key in done:
            yield part, done[part.key]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(processes) as pool:
        waiting = {pool.submit(_process, part, kept.parent): part for part in todo if part.key not in done}
        try:
            for future in as_completed(waiting):
                part = waiting[future]
                done[part.key] = future.result()
                fresh = kept.with_suffix(".new")
                fresh.write_text(json.dumps(done))
                fresh.replace(kept)
                yield part, done[part.key]
        finally:
            pool.shutdown(cancel_futures=True)


def _process(part: Part, folder: Path) -> dict[str, Any]:
    """A part that dies or hangs is a result too."""
    file = folder / f"{part.name}-{part.index}-{os.getpid()}.json"
    command = [sys.executable, "-m", "tests.campaigns.part", part.name, str(part.count), str(part.seed), str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    begin = time.monotonic()
    result = Result()
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
        )
        if file.exists():
            result = read(json.loads(file.read_text()))
        else:
            result.violate("crashed", f"{part.key}: exit code {ended.returncode}: {ended.stderr[-1500:]}")
    except subprocess.TimeoutExpired:
        result.violate("hung", f"{part.key}: after {LIMIT} s")
    finally:
        file.unlink(missing_ok=True)
    return {**result.as_json(), "seconds": round(time.monotonic() - begin, 1)}
