"""How OpenMP's threads wait: in new processes, since the runtime reads it once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
TELL = """
import json, os, sys
{before}
from fastadv.cli import main
early = "torch" in sys.modules
try:
    main({arguments!r})
except SystemExit as left:
    assert left.code in (0, None), left.code
print(json.dumps([early, "torch" in sys.modules, {{name: os.environ.get(name) for name in {names!r}}}]))
"""


def environment(**given: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    return {**inherited, "PYTHONPATH": str(ROOT), **given}


def tell(*arguments: str, before: str = "", **given: str) -> tuple[bool, bool, dict[str, str | None]]:
    """Whether torch was there before and after a command, and the settings that it left."""
    script = TELL.format(before=before, arguments=list(arguments), names=NAMES)
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(**given), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    early, late, found = json.loads(done.stdout.splitlines()[-1])
    return early, late, found


def test_a_command_waits_passively_and_so_do_its_children() -> None:
    early, late, found = tell("info")
    assert (early, late) == (False, True)
    assert (found["OMP_WAIT_POLICY"], found["KMP_BLOCKTIME"]) == ("PASSIVE", "0")


@pytest.mark.parametrize("name", NAMES)
def test_the_users_own_setting_wins(name: str) -> None:
    _, _, found = tell("--version", **{name: "ACTIVE" if name == "OMP_WAIT_POLICY" else "7"})
    assert [one for one in NAMES if found[one] is not None] == [name]


def test_a_program_that_has_torch_already_keeps_its_environment() -> None:
    early, _, found = tell("info", before="import torch")
    assert early
    assert not any(found.values())


@pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="this torch has no OpenMP")
@pytest.mark.parametrize("given", [{}, {"GOMP_SPINCOUNT": "12345"}])
def test_the_runtime_has_read_it(given: dict[str, str]) -> None:
    """`python -m fastadv COMMAND` too: GNU's runtime prints what it read as torch loads it."""
    done = subprocess.run(
        [sys.executable, "-m", "fastadv", "info"],
        env=environment(OMP_DISPLAY_ENV="verbose", **given),
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("not GNU's runtime")
    assert f"GOMP_SPINCOUNT = '{given.get('GOMP_SPINCOUNT', '0')}'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["train", "--help"], 0),
        (["trian"], 2),
        (["train", "--epsilom", "1"], 2),
        (["train", "--steps", "3"], 2),
        (["train", "--method", "magic"], 2),
        (["sweep", "--output-dir", "x", "--try", "fgm", "--y", "1"], 2),
        (["evaluate", "x", "--y"], 2),
        (["predict", "nowhere", "a text"], 2),
    ],
)
def test_what_needs_no_torch_loads_none_nor_transformers(arguments: list[str], code: int) -> None:
    script = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # an import is an error
from fastadv.cli import main
main({arguments!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), text=True, capture_output=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
