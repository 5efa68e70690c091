"""The page of a comparison, from results as they are and as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastadv.train import plots, report

RESULT = Path(__file__).parent.parent.parent / "docs/results/train.json"


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text())
    return found


def test_a_committed_result_has_its_page(result: dict[str, Any]) -> None:
    text = report.compose(result, [])
    for model in result["models"].values():
        for cell in model["accuracy"]:
            assert f"{100 * cell['accuracy']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]" in text
    assert 'class="warnings"' not in text


def test_warnings_come_first(result: dict[str, Any]) -> None:
    warnings = ["60 % of the tokens are unknown", "the model answers <one> class"]
    found = {"epsilon": 0.1, "warning": "no radius was found"}
    text = report.compose({**result, "warnings": warnings, "radius": found}, [])
    assert "the model answers &lt;one&gt; class" in text
    start = text.index('<div class="warnings">')
    assert start < text.index("no radius was found") < text.index("Clean accuracy") < text.index("<table>")


def test_every_cell_says_its_column(result: dict[str, Any]) -> None:
    """What a phone shows beside it, where rows stand one under the other."""
    text = report.compose(result, [])
    rows = text.count('<tr><th scope="row">')
    for heading in ("plain", "FGM", "difference, points"):
        assert text.count(f'<td data-of="{heading}">') == rows > 4


@pytest.mark.parametrize("rows", [[], [{"phase": "plain", "step": 5, "loss": float("nan")}]])
def test_losses_that_cannot_be_drawn(rows: list[dict[str, Any]]) -> None:
    assert plots.losses(rows, "FGM").startswith("<svg")


def test_an_end_of_an_interval_that_rounding_moved() -> None:
    cell = {"radius": 0.1, "accuracy": 0.0, "low": 1e-17, "high": 0.05}
    assert plots.radii({"plain": [cell]}, 10).startswith("<svg")
