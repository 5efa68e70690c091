"""`make versions`: what it keeps and shows, and its sessions that install here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("nox")

from tests import noxfile


def test_the_page_and_the_readme_say_what_ran() -> None:
    kept = json.loads(noxfile.RECORD.read_text())
    assert not any(run["failed"] for run in kept) and all(run["native"] and run["passed"] > 1000 for run in kept)
    assert noxfile.table(kept) in noxfile.PAGE.read_text()
    readme = " ".join((noxfile.ROOT / "README.md").read_text().split())
    claim = re.search(r"Python (3\.\d+) to (3\.\d+) and torch ([\d.]+) to ([\d.]+)", readme)
    assert claim is not None
    for name, ends in (("python", claim.groups()[:2]), ("torch", claim.groups()[2:])):
        ran = sorted({tuple(int(part) for part in re.findall(r"\d+", run[name])[:2]) for run in kept})
        assert [".".join(map(str, one)) for one in (ran[0], ran[-1])] == list(ends)


@pytest.mark.slow
def test_every_session_runs_or_says_why_not(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "nox", "-f", noxfile.__file__, "--envdir", tmp_path, "--report", report]
    free = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=free)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    sessions = json.loads(report.read_text())["sessions"]
    ran = [one for one in sessions if one["result"] == "success"]
    others = [one["reason"] for one in sessions if one["result"] != "success"]
    assert len(sessions) == len(noxfile.PYTHONS) * len(noxfile.TORCHES) and ran, told
    assert len(re.findall(r"^\d{4,} passed", told, re.MULTILINE)) == len(ran), told
    assert all(re.search(r"torch .* several GB|interpreter .* not found", reason) for reason in others), others
