"""Two ranks of a tensor- or sequence-parallel model against one process, float64."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import tensor_parallel, workers
from tests.support import assert_gradients

pytestmark = workers.MARKS
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workers.start(tensor_parallel.run, "tensor-parallel", tmp_path_factory.mktemp("tensor-parallel"))


@pytest.mark.parametrize("name", tensor_parallel.STEPS)
def test_a_step_is_that_of_one_process(found: Path, name: str) -> None:
    kind, method, *perturbed = tensor_parallel.STEPS[name]
    want = tensor_parallel.step(None, kind, method, *perturbed[:1])
    for one in workers.by_rank(found, name):
        assert_gradients(one, want, TOLERANCE)


@pytest.mark.parametrize("name", tensor_parallel.REFUSED)
def test_what_would_be_wrong_is_refused(found: Path, name: str) -> None:
    assert all(one["told"] for one in workers.by_rank(found, f"refused-{name}"))
