"""Two sweeps or comparisons with one file: nothing is lost or trained twice; a killed one takes nothing along."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastadv.jobs.errors import UserError
from fastadv.jobs.lock import lock
from fastadv.train import sweep

OUTPUT = Path("swept/sweep.json")
FORKED = multiprocessing.get_context("fork")  # with torch loaded already
POINTS = [("plain", {}), ("fgm", {"epsilon": 0.1})]


@pytest.fixture(autouse=True)
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training is a line in a file of its process."""
    monkeypatch.setattr(sweep, "common", lambda job: {"data": {"settings": {}}})
    monkeypatch.setattr(sweep, "announce", lambda job: None)
    monkeypatch.setattr(sweep, "_one", _one)


def _one(job: Any, name: str, arguments: dict[str, Any], seed: int, place: str) -> dict[str, Any]:
    with Path(f"trained-{os.getpid()}").open("a") as file:
        file.write(f"{name} {seed}\n")
    if job == "hang":
        time.sleep(60)
    time.sleep(0.002)
    return {"method": name, "arguments": arguments, "seed": seed, "pad": "x" * 200}


def _sweeping(seeds: list[int], job: Any = None) -> Any:
    process = FORKED.Process(target=sweep.train_all, args=(job, POINTS, seeds, OUTPUT, "c"), daemon=True)
    process.start()
    return process


def _kept() -> list[tuple[str, int]]:
    return sorted((one["method"], one["seed"]) for one in json.loads(OUTPUT.read_text())["runs"])


def _trained() -> list[str]:
    return sorted(line for path in Path().glob("trained-*") for line in path.read_text().splitlines())


def _until(reached: Callable[[], bool]) -> None:
    for _ in range(3000):
        if reached():
            return
        time.sleep(0.01)
    pytest.fail("nothing happened")


def test_both_results_are_kept() -> None:
    processes = [_sweeping(list(range(start, start + 20))) for start in (0, 100)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    wanted = [(name, start + seed) for name in ("fgm", "plain") for start in (0, 100) for seed in range(20)]
    assert _kept() == sorted(wanted)
    assert [path.name for path in OUTPUT.parent.iterdir()] == [OUTPUT.name]


def test_the_same_grid_is_shared(capfd: pytest.CaptureFixture[str]) -> None:
    processes = [_sweeping(list(range(15))) for _ in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    wanted = sorted((name, seed) for name in ("fgm", "plain") for seed in range(15))
    assert _kept() == wanted
    assert _trained() == sorted(f"{name} {seed}" for name, seed in wanted)


def test_a_killed_one_takes_nothing_along() -> None:
    hanging = _sweeping([0, 1], "hang")
    _until(lambda: Path(f"trained-{hanging.pid}").exists())
    other = _sweeping([0, 1])
    _until(lambda: OUTPUT.exists() and len(_kept()) == 3)  # all but the one that hangs
    os.kill(hanging.pid, signal.SIGKILL)
    hanging.join(60)
    other.join(60)
    assert other.exitcode == 0
    assert _kept() == [("fgm", 0), ("fgm", 1), ("plain", 0), ("plain", 1)]


def test_two_with_other_settings_are_not_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is refused before it trains, though the first has finished nothing yet."""

    def later(job: Any, name: str, arguments: dict[str, Any], seed: int, place: str) -> dict[str, Any]:
        monkeypatch.setattr(sweep, "common", lambda job: {"data": {"settings": {}}, "max_length": 1})
        with pytest.raises(UserError, match=r"holds trainings with other settings \(max_length\)"):
            sweep.train_all(None, [("fgm", {})], [0], OUTPUT, "c")
        return _one(job, name, arguments, seed, place)

    monkeypatch.setattr(sweep, "_one", later)
    sweep.train_all(None, [("plain", {})], [0], OUTPUT, "c")
    assert _kept() == [("plain", 0)]


def test_what_a_killed_one_had_begun_leaves_no_mark() -> None:
    """Its training may have been finished and kept before the mark was removed."""
    sweep.train_all(None, POINTS, [0], OUTPUT, "c")
    left, held = OUTPUT.with_name("sweep.json.0.lock"), OUTPUT.with_name("sweep.json.1.lock")
    left.touch()
    with lock(held):
        sweep.train_all(None, POINTS, [0], OUTPUT, "c")
        assert sorted(OUTPUT.parent.iterdir()) == [OUTPUT, held]
    assert list(OUTPUT.parent.iterdir()) == [OUTPUT]
