"""Norms over two ranks against one process, float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import groups, workers
from tests.support import assert_close, assert_gradients

pytestmark = workers.MARKS
TOLERANCE = 1e-10


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workers.start(groups.run, "groups", tmp_path_factory.mktemp("groups"))


@pytest.mark.parametrize("case", groups.CASES, ids=str)
def test_halves_of_sequences(found: Path, case: groups.Case) -> None:
    """Where each rank computes its own part of the loss gradients add up; where each computes all of it, their mean."""
    ranks, want = workers.by_rank(found, str(case)), groups.sharded(None, case)
    share = 1 / workers.WORLD if case.name in groups.POOLED else 1
    for name, value in want.items():
        if name.startswith("same"):
            for one in ranks:
                assert_close(one[name], value, TOLERANCE, name)
    summed = {name: sum(one[name] for one in ranks) * share for name in want if name.startswith("sum")}
    assert_gradients(summed, {name: want[name] for name in summed}, TOLERANCE)
    assert int(want["same skipped"]) == (3 if case.spoilt else 0)  # one sample in each of three ascents


@pytest.mark.parametrize(("cut", "name"), groups.UNEVEN)
def test_shards_of_different_lengths(found: Path, cut: int, name: str) -> None:
    ranks, want = workers.by_rank(found, f"uneven-{cut}-{name}"), groups.uneven_shards(None, cut, name)
    assert_close(ranks[0]["same norm"], want["same norm"], TOLERANCE, "norm")
    summed = {name: sum(one[name] for one in ranks) for name in want if name.startswith("sum")}
    assert_gradients(summed, {name: want[name] for name in summed}, TOLERANCE)


@pytest.mark.parametrize(("factor", "norm"), groups.SCALED)
def test_gradients_of_any_size(found: Path, factor: float, norm: str) -> None:
    ranks, want = workers.by_rank(found, f"scaled-{factor}-{norm}"), groups.scaled(None, 1.0, norm)
    assert_gradients({name: sum(one[name] for one in ranks) for name in want}, want, TOLERANCE)


@pytest.mark.parametrize("name", groups.WHOLE)
def test_halves_of_the_batch(found: Path, name: str) -> None:
    ranks, want = workers.by_rank(found, name), groups.of_the_batch(None, name)
    for one in ranks:  # halves have means of their own, twice the gradient: to Adam's guard that is a difference
        assert_gradients(one, want, 1e-5 if "adam" in name else TOLERANCE)


@pytest.mark.parametrize("index", range(4))
def test_a_rank_that_fails_under_ddp(found: Path, index: int) -> None:
    want = groups.of_the_batch(None, "whole-pgd-batch-l2")
    for one in workers.by_rank(found, f"failed-{index}"):
        assert_gradients(one, want, TOLERANCE)


def test_rows_of_all_ranks(found: Path) -> None:
    ranks = workers.by_rank(found, "rows")
    ids, values, mask = (torch.cat([one[name] for one in ranks]) for name in ("ids", "values", "mask"))
    sums = torch.zeros(int(ids.max()) + 1, values.shape[1]).double().index_add(0, ids[mask], values[mask])
    for one in ranks:
        want = sums[one["ids"]].masked_fill(~one["mask"].unsqueeze(1), 0)
        for name in ("room", "trimmed"):
            assert_close(one[name], want, TOLERANCE, name)
            assert int(one[f"{name} occupied"]) == len(ids[mask].unique())


def test_starts_take_the_length_of_all_shards(found: Path) -> None:
    ranks = workers.by_rank(found, "lengths")
    for one in ranks:
        assert_close(one["found"], one["want"], 1e-6, "start")
    assert not torch.equal(ranks[0]["found"][0], ranks[1]["found"][0])


def test_what_is_told(found: Path) -> None:
    for one in workers.by_rank(found, "told"):
        assert {name: bool(right) for name, right in one.items()} == dict.fromkeys(
            ("llr", "tied", "lengths", "no group", "uneven"), True
        )


def test_ranks_in_different_steps_are_told(found: Path) -> None:
    assert all(one["told"] for one in workers.by_rank(found, "apart"))


def test_a_dimension_of_a_mesh(found: Path) -> None:
    """Of two ranks it is the group; of one there is nothing to put together, and each has a ball of its own."""
    first, second = workers.by_rank(found, "mesh")
    radius = torch.full((groups.ROWS,), workers.PGD["epsilon"]).double()
    assert_close(torch.hypot(first["cp"], second["cp"]), radius, TOLERANCE, "one ball")
    assert_close(first["dp"], radius, TOLERANCE, "a ball of its own")
