"""The host's time beside the passes: the parts are all of it, and each kind of op is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastadv import kernels

pytest.importorskip("triton")
if kernels.interpreted():
    pytest.skip("launches nothing: triton interprets", allow_module_level=True)

from bench import host_time


def test_every_part_takes_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "host_time.json"
    result = host_time.main(["--rounds", "3", f"--output={output}"])
    assert json.loads(output.read_text()) == result
    assert [(case["scope"], case["case"]) for case in result["cases"]] == [
        (scope, title) for title in host_time.TITLES for scope in host_time.SCOPES
    ]
    for case in result["cases"]:
        launches = host_time.PARTS[host_time.LAUNCHES]
        assert (launches in case["parts"]) == (case["case"] != host_time.EMPTY)
        assert all(part["us"] > 0 for part in case["parts"].values())
        assert ("beside" in case) == (host_time.REST in case["parts"]) == (case["case"] != host_time.COLD)
    assert "| launches by Triton |" in capsys.readouterr().out


def test_the_clock_takes_off_what_is_inside() -> None:
    clock = host_time.Clock()
    with clock.range("outer"):
        for _ in range(3):
            with clock.range("inner"):
                sum(range(20_000))
    assert clock.spent["inner"] > 10 * clock.spent["outer"] > 0
    with clock.running():
        assert clock.runs
    assert not clock.runs
