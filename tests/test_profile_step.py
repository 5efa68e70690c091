"""The profile of a step: its parts are all of it, and what a profiler adds is not the engine's."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd.profiler_util import Interval

from bench import profile_step
from bench.profile_step import BESIDE, PASSES, parts

TINY = ["--batch", "2", "--length", "8", "--vocabulary", "100", "--model", "tiny", "--threads", "1", "--rounds", "1"]


def seen(*ranges: tuple[str, ...]) -> Any:
    """What a profiler reports of nested ranges, each of which takes ten milliseconds for itself and then 10 us."""
    events, now = [], 0.0

    def enter(names: Sequence[str]) -> None:
        nonlocal now
        if names:
            start, now = now, now + 10_000.0
            enter(names[1:])
            events.append(SimpleNamespace(name=names[0], time_range=Interval(start, now)))
            now += 10.0

    for names in ranges:
        enter(names)
    return SimpleNamespace(events=lambda: events)


def test_a_range_does_not_hold_those_inside_of_it() -> None:
    step, forward, guard = "fastadv::step", "fastadv::forward", "fastadv::guard"
    found = parts(seen((step, forward, guard), (step, guard), (guard,), (forward,), ("another", step)))
    expected = {"forward": 0.01001, "guard": 0.02, "the rest": 0.03002}  # what is outside of a step does not count
    assert found == pytest.approx({**dict.fromkeys((*PASSES, *BESIDE), 0.0), **expected})


def test_a_revision_without_ranges_says_so() -> None:
    with pytest.raises(SystemExit, match="no range 'fastadv::step'"):
        parts(seen(("fastadv::forward",)))


def test_the_parts_are_all_of_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, picture, trace = (tmp_path / name for name in ("profile.json", "profile.svg", "trace.json"))
    files = [f"--output={output}", f"--picture={picture}", f"--trace={trace}", "--top=3"]
    result = profile_step.main([*TINY, *files])
    (case,) = result["cases"]
    assert set(case["parts"]) == {*PASSES, *BESIDE}
    assert all(row["ms"] > 0 for row in case["parts"].values())
    assert sum(row["percent"] for row in case["parts"].values()) == pytest.approx(100, abs=1e-2)
    assert case["exclusive"]["percent"] == pytest.approx(
        sum(case["parts"][name]["percent"] for name in BESIDE), abs=1e-2
    )
    low, high = case["difference"]["interval_ms"]
    assert case["step"]["ms"] > 0 < case["passes_alone"]["ms"] and low <= case["difference"]["ms"] <= high
    assert json.loads(output.read_text()) == result
    assert picture.read_text().startswith("<svg")
    assert all(name in trace.read_text() for name in profile_step.PARTS if name != "fastadv::start")
    shown = capsys.readouterr().out
    profile_step.main(["--show", str(output)])
    assert capsys.readouterr().out in shown


@pytest.mark.parametrize("contestant", ["passes alone", "torch"])
def test_the_passes_alone_are_those_of_a_step(contestant: str) -> None:
    """Four passes, and neither a hook that is live afterwards nor a gradient for the table from the passes alone."""
    from bench.training import step
    from bench.workloads import classifier, inputs, loss_closure

    model: Any = classifier(profile_step.NETWORKS["tiny"], 100)
    closure, passes = loss_closure(model, inputs(2, 8, 100)), []
    before = closure()
    step(contestant, "PGD-3", model, lambda: (passes.append(0), closure())[1])()
    assert len(passes) == 4 and closure() == before
    assert (model.get_input_embeddings().weight.grad is None) == (contestant == "passes alone")
    assert model.classifier.weight.grad is not None


def test_threads_are_profiled_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []

    def run(command: Sequence[str], env: dict[str, str], **named: Any) -> None:
        started.append((env["OMP_NUM_THREADS"], next(part for part in command if part.startswith("--threads"))))
        profile_step.main([*(part for part in command[3:] if not part.startswith("--threads")), "--threads=1"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(profile_step, "THREADS", (1, 4))
    result = profile_step.main([*TINY, "--oversubscribed"])
    assert started == [("1", "--threads=1"), ("4", "--threads=4")]
    assert [one["model"] for one in result["oversubscribed"]] == ["tiny", "tiny"]
    assert "| threads |" in capsys.readouterr().out


def test_one_case_at_a_time_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        profile_step.main(["--all", "--top", "3"])
    assert "leave out --all" in capsys.readouterr().err
