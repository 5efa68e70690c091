"""The profile of a step: its parts are all of it, and it leaves nothing behind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import profile_step
from bench.profile_step import BESIDE, MODEL, Bench, Case, Recorder, patched, ranges

TINY = ["--batch", "2", "--length", "8", "--vocabulary", "100", "--model", "tiny", "--threads", "1", "--rounds", "1"]


def wrapped() -> list[Any]:
    return [vars(owner)[name] for owner, name, *_ in ranges()]


def bench(scope: str = "table") -> Bench:
    return Bench(Case(2, 8, 100), SimpleNamespace(model="tiny", steps=3, scope=scope))  # type: ignore[arg-type]


def test_what_passes_between_two_marks_is_the_innermost_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr(profile_step.time, "perf_counter", lambda: next(now))
    recorder = Recorder()
    inner = recorder.around(lambda: 5, "inner")
    assert recorder.around(inner, "outer")() == 5
    assert recorder.seconds == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_the_parts_are_all_of_the_step_and_everything_is_as_it_was(tmp_path: Path) -> None:
    before = wrapped()
    output, picture, trace = (tmp_path / name for name in ("profile.json", "profile.svg", "trace.json"))
    files = [f"--output={output}", f"--picture={picture}", f"--trace={trace}", "--top=3"]
    result = profile_step.main([*TINY, *files])
    assert all(now is then for now, then in zip(wrapped(), before, strict=True))
    (case,) = result["cases"]
    for one in case["every_round"]:
        assert sum(one["parts"].values()) == pytest.approx(one["wall"], rel=1e-9)
        assert set(one["parts"]) == {*MODEL, *BESIDE}
        assert all(seconds > 0 for seconds in one["parts"].values())
    calls = {row["name"]: row["calls"] for row in case["functions"]}
    passes = [calls[name] for name in ("forward, full", "Engine._hand_over", "forward, probe", "autograd.grad")]
    assert passes == [2, 2, 2, 2]
    assert calls["Engine.ascend"] == 3
    assert calls["Lookup.__call__"] == calls["_GatherPerturb.backward"] == 4
    assert json.loads(output.read_text()) == result
    assert picture.read_text().startswith("<svg")
    assert "Engine.ascend" in trace.read_text()


def test_a_step_that_fails_leaves_nothing_wrapped() -> None:
    before = wrapped()

    def fail() -> None:
        assert all(now is not then for now, then in zip(wrapped(), before, strict=True))
        raise RuntimeError

    one = bench()
    with pytest.raises(RuntimeError), patched(Recorder()):
        one.adv.backward(fail)
    one.adv.close()
    assert all(now is then for now, then in zip(wrapped(), before, strict=True))


@pytest.mark.parametrize("scope", ["table", "sample"])
def test_a_profiled_step_finds_the_same_gradients(scope: str) -> None:
    one = bench(scope)
    found = []
    for who in ("step", "profiled"):
        one.time(who, 1)
        found.append([parameter.grad.clone() for parameter in one.model.parameters() if parameter.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    one.adv.close()


def test_the_passes_alone_leave_the_model_as_it_was() -> None:
    one = bench()
    one.passes_alone(one.closure)
    assert not one.model.get_input_embeddings()._forward_hooks
    one.adv.close()


def test_threads_are_profiled_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def run(command: Sequence[str], env: dict[str, str], **named: Any) -> None:
        seen.append((env["OMP_NUM_THREADS"], next(part for part in command if part.startswith("--threads"))))
        profile_step.main([*(part for part in command[3:] if not part.startswith("--threads")), "--threads=1"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(profile_step, "THREADS", (1, 4))
    result = profile_step.main([*TINY, "--oversubscribed"])
    assert seen == [("1", "--threads=1"), ("4", "--threads=4")]
    assert [one["model"] for one in result["oversubscribed"]] == ["tiny", "tiny"]
    assert "| threads |" in capsys.readouterr().out


def test_what_cannot_be_profiled_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in ((["--device", "cuda"], "make gpu-check"), (["--all", "--top", "3"], "leave out --all")):
        with pytest.raises(SystemExit):
            profile_step.main(arguments)
        assert said in capsys.readouterr().err
