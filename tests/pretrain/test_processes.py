"""The command as a process: stopped and resumed, and started by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastadv.jobs.log import read_log
from tests.pretrain.job import arguments, pretrain
from tests.train.command import main_ok

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
PATIENCE = 120  # seconds


def start(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_ctrl_c_and_on_again(capsys: pytest.CaptureFixture[str]) -> None:
    """In the second training: the first one is done, and is not trained again."""
    given = ["--max-steps", "40", "--no-same-time", "--method", "fgm"]
    run = start("fastadv", *arguments("--output-dir", "run", *given))
    deadline = time.monotonic() + PATIENCE
    while len(read_log(Path("run/log.jsonl"), "adversarial")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    printed, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == 130, printed + said
    assert "adversarial: stopped after step" in said
    assert "to continue: fastadv pretrain --resume --output-dir run" in said
    assert "Traceback" not in said
    done = Path("run/plain/phase.json").stat().st_mtime_ns
    main_ok("pretrain", "--resume", "--output-dir", "run")
    assert "goes on from" in capsys.readouterr().err
    assert Path("run/plain/phase.json").stat().st_mtime_ns > done, "what is measured joins it"
    result = json.loads(Path("run/result.json").read_text())
    whole = pretrain("whole", *given)
    for name in ("plain", "adversarial"):
        assert result["trainings"][name]["measured"] == whole["trainings"][name]["measured"]
        ours, theirs = (load_file(Path(folder, name, "model.safetensors")) for folder in ("run", "whole"))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        losses = [[row["loss"] for row in read_log(Path(folder, "log.jsonl"), name)] for folder in ("run", "whole")]
        assert len(losses[0]) >= len(losses[1])
    assert len(read_log(Path("run/log.jsonl"), "plain")) == len(read_log(Path("whole/log.jsonl"), "plain"))


@pytest.mark.dist
def test_torchrun() -> None:
    given = ["--max-steps", "4", "--no-same-time", "--dtype", "float64", "--method", "fgm"]
    both = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "fastadv"]
    run = start(*both, *arguments("--output-dir", "two", *given))
    printed, said = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, said
    assert printed.count("two/result.json") == 1, "one process prints"
    two: dict[str, Any] = json.loads(Path("two/result.json").read_text())
    one = pretrain("one", *given)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, training in one["trainings"].items():
        assert Path("two", name, "model.safetensors").is_file()
        for mine, theirs in zip(training["measured"], two["trainings"][name]["measured"], strict=True):
            assert theirs["perplexity"] == pytest.approx(mine["perplexity"], rel=1e-9)
