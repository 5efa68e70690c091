"""docs/scale.md shows what examples/scale.py computes. What it counts is tested in tests/distributed/test_scale.py."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from tests.pages import ROOT

SCALE: dict[str, Any] = runpy.run_path(str(ROOT / "examples/scale.py"))
PAGE = (ROOT / "docs/scale.md").read_text()
METHODS = {method.name: method for method in SCALE["METHODS"]}
DRAWN_BY = re.search(r"^matplotlib==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("title", SCALE["tables"]())
def test_the_page_shows_the_tables(title: str) -> None:
    assert "\n\n" + "\n".join(SCALE["tables"]()[title]) + "\n\n" in PAGE


def test_the_script_prints_the_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["scale.py"])
    runpy.run_path(str(ROOT / "examples/scale.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(f"{title}\n\n" + "\n".join(lines) in printed for title, lines in SCALE["tables"]().items())


@pytest.mark.skipif(mpl.__version__ != DRAWN_BY, reason=f"the picture was drawn by matplotlib {DRAWN_BY}")
def test_the_picture_shows_what_is_computed(tmp_path: Path) -> None:
    SCALE["draw"](tmp_path / "scale.svg")
    assert (tmp_path / "scale.svg").read_text() == (ROOT / "docs/pictures/scale.svg").read_text()


@pytest.mark.parametrize("cluster", SCALE["CLUSTERS"], ids=lambda cluster: cluster.name)
def test_computing_hides_what_is_sent(cluster: Any) -> None:
    """With 8,192 tokens a step costs its computing, but for the exception that the page names."""
    waits = set()
    for model in SCALE["MODELS"]:
        for sharding in SCALE["shardings"](model):
            plain = SCALE["step"](model, cluster, sharding, METHODS["plain"])
            for method in METHODS.values():
                cost = SCALE["step"](model, cluster, sharding, method) / plain
                if cost != pytest.approx(method.over_plain(model), rel=1e-3):
                    waits.add((model.name, sharding.name))
    assert waits <= {("1B", "full")}


def test_what_the_page_says_in_words() -> None:
    text = " ".join(PAGE.split())
    model = SCALE["MODELS"][1]
    costs = {name: method.over_plain(model) for name, method in METHODS.items()}
    assert f"FGM costs {costs['FGM']:g} plain steps, FreeLB-3 costs {costs['FreeLB-3']:g}" in text
    assert f"PGD-3 costs {costs['PGD-3']:.1f}, SMART and VAT {costs['SMART']:.2f}" in text
    assert f"{costs['VAT']:.2f}" == f"{costs['SMART']:.2f}"
    assert f"PGD-3 costs {(3 + costs['PGD-3']) / 4:.1f} plain steps on average" in text
    assert f"{SCALE['delta'](model, METHODS['PGD-3']) / 1e9:.1f} GB for 8,192 tokens" in text
    assert (SCALE["held"](model, METHODS["PGD-3"], "last"), SCALE["held"](model, METHODS["PGD-3"], "keep")) == (
        4 * model.parameters,
        6 * model.parameters,
    )
