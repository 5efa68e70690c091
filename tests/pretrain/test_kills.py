"""A training that is killed goes on as if nothing had been. `python -m tests.pretrain.killed` tries more places."""

from __future__ import annotations

import pytest

from tests.distributed.workers import MARKS
from tests.pretrain import killed, toy

pytestmark = [*MARKS, pytest.mark.slow]


@pytest.mark.parametrize(
    ("world", "method", "place", "seed"),
    [(1, "vat", "in a save, half of a file", 3), (2, "freelb", "in a save, before its name", 5)],
)
def test_bitwise(world: int, method: str, place: str, seed: int) -> None:
    found, said = killed.killed(world, method, place, seed)
    assert said == "goes on"
    assert toy.difference(found, killed.uninterrupted(world, method)) == 0


def test_on_fewer_ranks() -> None:
    found, said = killed.killed(2, "pgd", "in a micro-batch", 4, "causal", after=1)
    assert said == "goes on, 2 processes"
    assert toy.difference(found, killed.uninterrupted(1, "pgd", "causal")) < 1e-13
