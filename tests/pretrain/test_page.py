"""What the page shows of the default job is the committed run."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "examples/pretrain_results.py"))


def test_the_page_shows_the_committed_run() -> None:
    result = json.loads((ROOT / "docs/results/pretrain.json").read_text())
    assert SCRIPT["section"](result) in (ROOT / "docs/pretraining.md").read_text()
    assert (ROOT / "docs/results/pretrain.svg").read_text().startswith("<svg")
