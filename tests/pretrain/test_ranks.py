"""Two ranks under FSDP2 train as one process does on the union of their rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.workers import MARKS, start
from tests.pretrain import ranks, toy

pytestmark = [*MARKS, pytest.mark.slow]

# Where a divergence of two nearly equal answers is differentiated, AdamW's first steps divide rounding by rounding.
LOOSE = {"causal-smart": 1e-7, "causal-vat": 1e-7, "masked-smart": 1e-7, "low": 5e-3}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for model in ("causal", "masked"):
        toy.settings(folder, model)
    return start(ranks.run, "all", folder)


@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks_are_one_process(both: Path, case: str) -> None:
    two, one = torch.load(both / f"{case}.pt"), ranks.case(case, both, toy.alone())
    assert toy.difference(one, two) < LOOSE.get(case, 1e-13)


def test_one_rank_is_told_to_stop_and_all_do(both: Path) -> None:
    found = [torch.load(both / f"interrupted-{rank}.pt") for rank in range(ranks.WORLD)]
    assert {one["said"] for one in found} == {"phase: stopped after step 7 of 10"}
    whole = torch.load(both / "causal-freelb.pt")
    assert all(toy.difference(one["weights"], whole) == 0 for one in found)
