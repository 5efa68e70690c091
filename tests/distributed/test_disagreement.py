"""One of two processes fails and goes on: the step is void on both, or both are told; gradients are never mixed."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import disagreeing, workers
from tests.support import assert_gradients, same_bits

pytestmark = workers.MARKS
TOLERANCE = 1e-6
VOID = "RuntimeError: rank 1 failed in this step"
APART = "RuntimeError: the ranks have come apart"
FAULTY = disagreeing.FAULTY
start = functools.partial(workers.start, disagreeing.run)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start("cases", tmp_path_factory.mktemp("cases"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start("slow", tmp_path_factory.mktemp("slow"))


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    """Of the suite that a test's case is in."""
    found: Path = request.getfixturevalue("slow" if request.node.get_closest_marker("slow") else "cases")
    return found


SLOW = pytest.mark.slow


def outcomes(folder: Path, case: str) -> list[dict[str, Any]]:
    """What both processes raised and ended with; none of them waited long."""
    found = workers.by_rank(folder, case)
    for one in found:
        assert one["longest"] < 3 * 2 * disagreeing.TIMEOUT  # it hangs for ever where nothing ends it
    return found


def trained(found: list[dict[str, Any]], name: str, *without: int, micro_batches: int = 1) -> None:
    """Both ended with the same weights: those of one process that left some steps out."""
    for key, value in found[0]["values"].items():
        assert same_bits(value, found[1]["values"][key]), f"{key} differs between the processes"
    if "table" not in name:  # there a sample's perturbation depends on who else is in the batch
        assert_gradients(found[0]["values"], disagreeing.alone(name, without, micro_batches), TOLERANCE)


def void(found: list[dict[str, Any]], step: int, own: str) -> None:
    """That step alone raised: on rank 1 its own error, on rank 0 one that names rank 1."""
    assert [list(one["errors"]) for one in found] == [[step], [step]], [one["errors"] for one in found]
    assert found[0]["errors"][step].startswith(VOID)
    assert found[1]["errors"][step].startswith(own)


@pytest.mark.parametrize(
    ("name", "index"),
    [*disagreeing.PASSES, *(pytest.param(*one, marks=SLOW) for one in disagreeing.MORE_PASSES)],
)
def test_a_closure_fails(folder: Path, name: str, index: int) -> None:
    found = outcomes(folder, f"before-{name}-{index}")
    void(found, FAULTY, "PlannedError")
    trained(found, name, FAULTY)


@pytest.mark.parametrize(
    ("case", "name", "own"),
    [
        pytest.param("after", "pgd-sample", "PlannedError", marks=SLOW),
        pytest.param("inner", "pgd-sample", "PlannedError", marks=SLOW),
        pytest.param("inner-plain", "plain", "PlannedError", marks=SLOW),
        ("mask", "pgd-sample", "ValueError"),
        ("interrupted", "pgd-sample", "KeyboardInterrupt"),
        pytest.param("ascent", "freeat", "PlannedError", marks=SLOW),
    ],
)
def test_the_step_is_void_on_both(folder: Path, case: str, name: str, own: str) -> None:
    """After the forward, a method made on the model inside DDP, an argument, a Ctrl-C, after the reduction."""
    found = outcomes(folder, case)
    void(found, FAULTY, own)
    trained(found, name, FAULTY)


@pytest.mark.parametrize("on", [pytest.param("wrapper", marks=SLOW), "model"])
def test_the_first_step_is_void_too(folder: Path, on: str) -> None:
    found = outcomes(folder, f"first-{on}")
    void(found, 0, "PlannedError")
    trained(found, "pgd-sample", 0)


def test_a_micro_batch_that_fails_makes_its_optimizer_step_void(folder: Path) -> None:
    found = outcomes(folder, "micro")
    void(found, FAULTY, VOID)
    trained(found, "pgd-sample", FAULTY, micro_batches=2)


@pytest.mark.slow
def test_a_search_that_fails_disturbs_nobody(folder: Path) -> None:
    found = outcomes(folder, "search")
    assert not found[0]["errors"] and not found[1]["errors"]
    trained(found, "pgd-sample")


@pytest.mark.slow
def test_one_may_attack_where_the_other_does_not(folder: Path) -> None:
    found = outcomes(folder, "attacked-fgm-table")
    assert not found[0]["errors"] and not found[1]["errors"]
    trained(found, "fgm-table")


@pytest.mark.slow
def test_steps_with_more_reductions_than_the_others_are_void(folder: Path) -> None:
    """AWP reduces twice, and an unattacked step once."""
    found = outcomes(folder, "attacked-awp")
    assert all("different places" in one["errors"][FAULTY] and len(one["errors"]) == 1 for one in found)
    trained(found, "awp", FAULTY)


@pytest.mark.parametrize(
    "name", ["pgd-sample", *(pytest.param(name, marks=SLOW) for name in ("fgm-table", "smart", "awp"))]
)
def test_an_empty_batch(folder: Path, name: str) -> None:
    found = outcomes(folder, f"empty-{name}")
    assert not found[0]["errors"] and not found[1]["errors"], found
    assert all(value.isfinite().all() for value in found[0]["values"].values())
    trained(found, "table")


@pytest.mark.slow
def test_uneven_batches_in_torchs_join(folder: Path) -> None:
    found = outcomes(folder, "joined")
    assert not found[0]["errors"] and not found[1]["errors"], found
    trained(found, "table")


def test_fsdp2_goes_on_where_all_fail_alike(folder: Path) -> None:
    found = outcomes(folder, "both-sharded")
    assert [list(one["errors"]) for one in found] == [[FAULTY], [FAULTY]], found
    trained(found, "pgd-sample", FAULTY)


@pytest.mark.slow
def test_fsdp2_in_one_process_alone(folder: Path) -> None:
    """Whatever it has begun by then, both are told."""
    told(outcomes(folder, "sharded-late"))


def told(found: list[dict[str, Any]]) -> None:
    """From the faulty step on nothing is trained any more: every step says that the processes have come apart."""
    rest = list(range(FAULTY, disagreeing.STEPS))
    assert [list(one["errors"]) for one in found] == [rest, rest], found
    assert all(one["errors"][number].startswith(APART) for one in found for number in rest[1:]), found


@pytest.mark.slow
@pytest.mark.parametrize("case", ["backward", "sharded"])
def test_a_fault_that_nothing_can_make_void(folder: Path, case: str) -> None:
    """In the reducing backward itself, or in FSDP2's forward: the other process waits until its group gives up."""
    told(outcomes(folder, case))


@pytest.mark.slow
def test_a_process_with_fewer_batches(folder: Path) -> None:
    found = outcomes(folder, "stops")
    assert not found[1]["errors"]
    assert list(found[0]["errors"]) == [disagreeing.STEPS - 1]
    assert "not every rank came to this step" in found[0]["errors"][disagreeing.STEPS - 1]


@pytest.mark.slow
def test_a_fault_inside_of_torchs_join(folder: Path) -> None:
    errors = outcomes(folder, "fails-inside-join")[1]["errors"]
    assert list(errors) == [FAULTY, FAULTY + 1]
    assert errors[FAULTY].startswith("PlannedError") and errors[FAULTY + 1].startswith(APART)
