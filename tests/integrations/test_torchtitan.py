"""torchtitan's Trainer with the recipe's step, on CPU processes: the weights of a plain loop over whole batches."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ABSENT = importlib.util.find_spec("torchtitan") is None
pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.skipif(ABSENT, reason="torchtitan is not installed")]


@pytest.mark.parametrize("processes", [1, 2])
def test_as_a_plain_loop(processes: int, tmp_path: Path) -> None:
    """FSDP2, accumulation, packed documents, unequal numbers of labels, a term; the chunked loss is refused."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    module = ["-m", "tests.integrations.torchtitan_cpu", str(tmp_path)]
    ended = subprocess.run([*command, *module], env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("done") == processes
