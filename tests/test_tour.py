"""The tour runs from top to bottom, and is committed as it ran."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

from fastadv.jobs.errors import UserError
from fastadv.train import model

TOUR = Path(__file__).parent.parent / "examples/tour.ipynb"


def code() -> list[dict[str, Any]]:
    return [cell for cell in json.loads(TOUR.read_text())["cells"] if cell["cell_type"] == "code"]


def test_the_tour_is_committed_as_it_ran() -> None:
    outputs = [output for cell in code() for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert [cell["execution_count"] for cell in code()] == list(range(1, len(code()) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert TOUR.stat().st_size < 400_000


@pytest.mark.slow
def test_the_tour_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The cells in one namespace, as a kernel runs them. What it shows holds: FGM helps, and no model is constant."""
    try:
        model.resolve(model.DEFAULT)
    except UserError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    names: dict[str, Any] = {}
    for number, cell in enumerate(code(), 1):
        exec(compile("".join(cell["source"]), f"tour, cell {number}", "exec"), names)
    assert names["plain_accuracy"][0] > 0.62
    assert names["robust_accuracy"][0] > 0.62
    assert names["robust_accuracy"][1] > names["plain_accuracy"][1]
    assert names["same"]
    assert "the same answers: True" in capsys.readouterr().out
