"""A seeded part of the campaigns: a little in every test run, a tenth of each with the slow tests."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.campaigns import runner, table, trials
from tests.campaigns.catalogue import CAMPAIGNS
from tests.campaigns.result import Result, read

DIST = pytest.mark.dist
STEPS = ("torch_operations", "python_calls", "signals_at_calls", "sigints", "storms", "second_faults")


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """A test run in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def nothing_wrong(found: Result, cases: int) -> None:
    assert found.cases == cases
    assert not found.wrong, "\n".join([str(dict(found.wrong)), *found.details])


@pytest.mark.parametrize("name", STEPS)
def test_a_little(name: str) -> None:
    found = getattr(trials, name)(30, 1)
    nothing_wrong(found, 30)
    assert found.outcomes["as before"] > 0, "no fault was met"


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(one, marks=DIST if one == "ranks" else ()) for one in CAMPAIGNS])
def test_a_tenth(name: str) -> None:
    count = CAMPAIGNS[name].total // 10
    found = CAMPAIGNS[name].run(count, 2)
    assert found.cases >= count
    nothing_wrong(found, found.cases)


# The runner


def test_an_interrupted_campaign_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def process(part: runner.Part, folder: Path) -> dict[str, Any]:
        ran.append(part)
        return Result(part.count).as_json()

    monkeypatch.setattr(runner, "_process", process)
    todo, kept = runner.parts(["operations", "ops"], 0.1, 5), tmp_path / "kept.json"
    assert sum(part.count for part in todo) == 2_000 + 18_000
    first = [result for _, result in runner.run(todo[:2], kept, 1)]
    assert len(first) == 2 == len(ran)
    everything = dict(runner.run(todo, kept, 1))
    assert set(everything) == set(todo)
    assert sorted(ran) == sorted(todo), "what was finished ran again"


def test_a_part_that_dies_is_counted(tmp_path: Path) -> None:
    found = read(runner._process(runner.Part("no such campaign", 0, 1, 1), tmp_path))
    assert dict(found.wrong) == {"crashed": 1}
    assert "no such campaign" in found.details[0]
    assert not list(tmp_path.iterdir())


def test_a_part_in_its_process(tmp_path: Path) -> None:
    found = read(runner._process(runner.Part("operations", 0, 5, 1), tmp_path))
    nothing_wrong(found, 5)


def test_the_table() -> None:
    found = Result(3)
    found.outcomes.update({"as before": 1, "as done": 1, "after the step": 1})
    found.violate("stays busy", "a fault")
    row = {"name": "sigints", "title": "signals", **json.loads(json.dumps(found.as_json()))}
    assert table.cells(row) == ["signals", "3", "1", "2", "1 stays busy"]
    assert table.after_all({"rows": [row]}) == (1, 2)
