"""A model in two stages under a schedule of torch.distributed.pipelining equals one process, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import pipelining, workers
from tests.support import assert_gradients

pytestmark = workers.MARKS


def start(suite: str, factory: pytest.TempPathFactory) -> Path:
    return workers.start(pipelining.run, suite, factory.mktemp(suite))


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start("fast", tmp_path_factory)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start("slow", tmp_path_factory)


def equals_one_process(folder: Path, case: str) -> None:
    """Gradients of both stages, losses, and the perturbation, in each of three steps."""
    first, last = workers.by_rank(folder, case)
    want = pipelining.expected(case.partition("-")[2])
    assert {*first, *last} == {*want}
    assert_gradients({**first, **last}, want, 1e-12)


@pytest.mark.parametrize("case", [case for case in pipelining.FAST if case.startswith("Schedule")])
def test_steps_are_those_of_one_process(fast: Path, case: str) -> None:
    equals_one_process(fast, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", pipelining.SLOW)
def test_steps_of_others_are_those_of_one_process(slow: Path, case: str) -> None:
    equals_one_process(slow, case)


def test_all_stages_draw_the_same_masks(fast: Path) -> None:
    for mode in ("same", "fresh", "off"):
        first, last = workers.by_rank(fast, f"masks-{mode}")
        clean, adversarial = first["losses"].tolist()
        assert (clean == adversarial) == (mode != "fresh")
        assert first["modes"].all() and last["modes"].all()


def test_a_step_that_fails_between_passes_is_void_on_all_ranks(fast: Path) -> None:
    for found in workers.by_rank(fast, "failed"):
        assert found["told"].tolist() == [True]
        assert found["again"].all()


def test_methods_that_need_more_than_passes_are_refused(fast: Path) -> None:
    for found in workers.by_rank(fast, "refused"):
        assert {name for name, told in found.items() if told} == set(pipelining.REFUSED)


def test_schedules_and_stages_that_cannot_be_driven_are_refused(fast: Path) -> None:
    for found in workers.by_rank(fast, "schedules"):
        assert {name for name, told in found.items() if told} == {"scaled", "no loss", "several", "compiled"}


def test_a_schedule_in_a_closure_is_an_error_that_names_the_way(fast: Path) -> None:
    assert workers.by_rank(fast, "in-a-closure")[0]["told"]
