"""`fastadv compare`: every method trains, what is finished is not run again, and what is written can be read."""

from __future__ import annotations

import json
import statistics
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from fastadv.cli import main
from fastadv.jobs import method_options
from fastadv.train import compare, phase
from tests.train.command import main_ok, refused


def command(encoder: Path, table: Path, *more: str) -> list[str]:
    fixed = ["--max-steps", "2", "--attack-samples", "10", "--radii", "0.1", "--output-dir", "out"]
    return ["compare", "--model", str(encoder), "--data", str(table), *fixed, *more]


def saved() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("out", compare.RESULT).read_text())
    return found


def test_every_method_trains(encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main_ok(*command(encoder, table, "--seeds", "0"))
    result = saved()
    assert [run["method"] for run in result["runs"]] == ["plain", *method_options.methods()]
    for run in result["runs"]:
        assert run["steps"] == 2
        assert run["peak_memory"] > 0
        assert [cell["radius"] for cell in run["accuracy"]] == [0.0, 0.1]
    printed = capsys.readouterr().out
    assert all(name in printed for name in method_options.methods())
    page = Path("out", compare.TABLE).read_text()
    assert (
        page.splitlines()[0]
        == "| method | seeds | clean, % | radius 0.1, % | clean - plain | s per step | peak memory |"
    )
    assert len(page.splitlines()) == 2 + len(result["runs"])
    picture = ET.fromstring(Path("out", compare.PICTURE).read_text())
    assert picture.tag.endswith("svg")


def test_goes_on_where_it_was_stopped(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the fourth training; then with one seed more and a setting besides."""
    given, train, trained = command(encoder, table, "--methods", "fgm,smart"), phase.train, []

    def stopped(job: Any, title: str, *arguments: Any, **named: Any) -> Any:
        trained.append(title)
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(job, title, *arguments, **named)

    monkeypatch.setattr(phase, "train", stopped)
    with pytest.raises(SystemExit) as left:
        main([*given, "--seeds", "0,1"])
    assert left.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = saved()["runs"]
    assert [(run["method"], run["seed"]) for run in first] == [("plain", 0), ("fgm", 0), ("smart", 0)]
    main_ok(*given, "--seeds", "0,1", "--try", "smart weight=5")
    assert trained[4:] == [
        "[4/8] smart weight=5, seed 0", "[5/8] plain, seed 1", "[6/8] fgm, seed 1", "[7/8] smart, seed 1",
        "[8/8] smart weight=5, seed 1",
    ]  # fmt: skip
    result = saved()
    assert [run for run in result["runs"] if run in first] == first
    rows = {row.setting: row for row in compare.summary(result["runs"])}
    assert set(rows) == {"plain", "fgm", "smart", "smart weight=5"}
    shares = [run["accuracy"][0]["accuracy"] for run in result["runs"] if run["method"] == "fgm"]
    assert rows["fgm"].accuracy[0.0].mean == pytest.approx(statistics.mean(shares))
    assert rows["fgm"].accuracy[0.0].deviation == pytest.approx(statistics.stdev(shares))
    assert rows["plain"].difference is None
    plain = [run["accuracy"][0]["accuracy"] for run in result["runs"] if run["method"] == "plain"]
    mine = rows["fgm"].difference
    assert mine is not None
    assert mine.values == pytest.approx([a - b for a, b in zip(shares, plain, strict=True)])


def test_refuses(encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, *command(encoder, table, "--methods", "fgm,gan"))
    assert "there is no method 'gan'" in message
    message = refused(capsys, *command(encoder, table, "--methods", "fgm", "--try", "smart radius=1"))
    assert "smart has no parameter 'radius'" in message
    main_ok(*command(encoder, table, "--methods", "plain", "--seeds", "0"))
    message = refused(capsys, *command(encoder, table, "--methods", "plain", "--learning-rate", "1"))
    assert "other settings (training_arguments)" in message
    assert "--output-dir" in message
