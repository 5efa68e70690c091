"""Faults planted in csrc/*.cu: what the emulator's checks see, and that they see nothing where there is none."""

from __future__ import annotations

import functools
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from fastadv import native
from tests.csrc import device_checks
from tests.csrc.device_checks import LAYOUTS

if not (native.available() and sys.platform.startswith("linux")):
    pytest.skip("no C++ ops, or not Linux", allow_module_level=True)

from tests.csrc.emulator.build import Patch, build
from tests.csrc.emulator.device import copied, running
from tests.csrc.emulator.faults import FAULTS, REFUSED

BF16 = torch.bfloat16
# Faults are the same in every dtype, and in fewer blocks.
FEWER = [
    Patch("rows.h", "kRowsParts = 768;", "kRowsParts = 260;"),
    Patch("rows.h", "    case kFloat64: return visitor(as(double()));\n", ""),
    Patch("rows.h", "    case kFloat16: return visitor(as(Float16()));\n", ""),
]
# Each takes as long as the compiler: these are in `make test`.
QUICK = {
    "the barrier before the partial sums",
    "the barrier behind the partial sums",
    "a thread that leaves a loop with barriers",
    "a part that nobody reads",
    "a pack beyond the row",
    "blocks that wait for the first",
    "a bound forgotten",
    "rows that are half aligned",
    "a chunk's tail",
    "packs that are not aligned",
}


def checks() -> Iterator[Callable[[], None]]:
    """A few of every kind, in another order than the files have them."""
    put = copied
    yield functools.partial(device_checks.does_nothing_to_nothing, put)
    for outside in (-1, 6):
        yield functools.partial(device_checks.leaves_out_what_is_out_of_range, put, outside, 0)
    yield functools.partial(device_checks.keeps_every_bit_without_a_gradient, put, BF16, math.nan, 1)
    for layout, dim in itertools.product(LAYOUTS, (33, 264)):
        yield functools.partial(device_checks.keeps_and_puts_back, put, BF16, dim, True, layout)
    yield functools.partial(device_checks.takes_gradients_in_one_launch, put, "average", [BF16])
    rules = [("l2", "l2", 1), ("max", "unit", 1), ("max", "unit", 0), ("l2", "unit", 0), ("sign", "none", 0)]
    for rule, (some, layout) in itertools.product(rules, ((True, "shifted"), (False, "aligned"))):
        yield functools.partial(device_checks.steps_twice, put, BF16, 300, rule, some, layout, 9)
    yield functools.partial(device_checks.steps_twice, put, torch.float32, 5, ("l2", "none", 0), False, "uneven", 300)


def found(patches: Sequence[Patch]) -> str | None:
    """What the first check that fails has to say; None if all pass. A patch that does not apply is an error."""
    patched = build([*patches, *FEWER])
    for number, check in enumerate(checks()):
        torch.manual_seed(number)
        try:
            with running(patched, seed=number):
                check()
        except (AssertionError, RuntimeError, pytest.fail.Exception) as error:
            return str(error)
    return None


@pytest.mark.usefixtures("built")
def test_emulated_checks_pass_without_a_fault() -> None:
    assert found([]) is None


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAULTS]
)
def test_emulated_fault_is_found(name: str) -> None:
    said = found([FAULTS[name]])
    assert said is not None
    assert re.search(REFUSED.get(name, ""), said)


def test_emulated_faults_are_of_known_names() -> None:
    assert QUICK | REFUSED.keys() <= FAULTS.keys()
