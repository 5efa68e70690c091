"""rows and grads in CUDA, with the CPU in the GPU's place: csrc/*.cu, built for the emulator (tests/csrc/emulator)."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastadv import native
from fastadv.native.rows import rows_back_up
from tests.csrc import device_checks
from tests.csrc.device_checks import DIMS, DTYPES, LAYOUTS, RULES, rows_step

if not (native.available() and sys.platform.startswith("linux")):
    pytest.skip("no C++ ops, or not Linux", allow_module_level=True)

from tests.csrc.emulator.build import Built
from tests.csrc.emulator.device import copied, running

ROOT = Path(__file__).parents[2]
ROWS = 9  # few: an emulated block takes its time
CASES = list(itertools.product(RULES, (True, False), DTYPES))


@pytest.fixture
def device(built: Built) -> Iterator[None]:
    with running(built, seed=0):
        yield


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_rows_are_kept_and_put_back(layout: str, some: bool, dim: int, dtype: torch.dtype) -> None:
    device_checks.keeps_and_puts_back(copied, dtype, dim, some, layout)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("rule", "some", "dtype"), CASES, ids=str)
def test_emulated_steps(rule: tuple[str, str, int], some: bool, dtype: torch.dtype) -> None:
    """Every rule; of dimensions and alignments each case has one. The slow test has all."""
    at = CASES.index((rule, some, dtype))
    device_checks.steps_twice(copied, dtype, [33, 100, 264, 1025][at // 4 % 4], rule, some, LAYOUTS[at // 3 % 3], ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_steps_of_all_sizes(layout: str, dim: int, dtype: torch.dtype, built: Built) -> None:
    with running(built, seed=1):
        for rule, some in itertools.product(RULES, (True, False)):
            device_checks.steps_twice(copied, dtype, dim, rule, some, layout)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("rule", [("max", "unit", 0), pytest.param(("l2", "l2", 0), marks=pytest.mark.slow)], ids=str)
def test_emulated_steps_of_more_rows_than_blocks(rule: tuple[str, str, int]) -> None:
    device_checks.steps_twice(copied, torch.bfloat16, 5, rule, False, "aligned", count=1100)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_emulated_groups_without_a_gradient(bad: float, group: int, dtype: torch.dtype) -> None:
    device_checks.keeps_every_bit_without_a_gradient(copied, dtype, bad, group)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("outside", [-2, -1, 5, 6])
def test_emulated_rows_out_of_range(outside: int, group: int) -> None:
    device_checks.leaves_out_what_is_out_of_range(copied, outside, group)


@pytest.mark.usefixtures("device")
def test_emulated_nothing() -> None:
    device_checks.does_nothing_to_nothing(copied)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", ["copy", "accumulate", "average"])
def test_emulated_gradients_in_one_launch(what: str, dtype: torch.dtype) -> None:
    device_checks.takes_gradients_in_one_launch(copied, what, [dtype, torch.bfloat16])


def test_emulated_results_do_not_depend_on_the_order_of_threads(built: Built) -> None:
    for rule in RULES:
        found = []
        for seed in range(3):
            torch.manual_seed(0)
            with running(built, seed):
                table, grad, skipped = (copied(t) for t in (torch.randn(7, 33), torch.randn(7, 33), torch.tensor(0)))
                saved = rows_back_up(table, None)
                rows_step(table, grad, saved, None, skipped, 0.3, 0.2, *rule)
                found.append(table.cpu())
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


@pytest.mark.slow
def test_emulated_under_address_sanitizer() -> None:
    """All of the above that is quick, with every allocation between zones that nobody may touch."""
    flags = "-fsanitize=address -fno-omit-frame-pointer -g"
    compiler = os.environ.get("CXX", "g++")
    library = subprocess.run([compiler, "-print-file-name=libasan.so"], check=True, text=True, capture_output=True)
    environment = {"CXXFLAGS": flags, "LDFLAGS": flags, "LD_PRELOAD": library.stdout.strip()}
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
        "-m",
        "not slow",
        __file__,
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
