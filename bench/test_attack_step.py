"""One attack step, from dE to the next forward's E: the second step of PGD, with cold caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import contestants as who
from bench.check import same_embeddings
from bench.contestants import Ball
from bench.race import LIMIT, Copy, Entry, Result, race, replay_clock, report
from bench.workloads import Size, gradient, table, zipf

Rounds = Callable[[int], int]
TABLE: dict[str, Any] = {
    "classic script": who.ClassicStep,
    "plain, index_add": who.IndexAddStep,
    "plain PyTorch": who.BestStep,
    "torch.compile": who.CompiledStep,
    "fastadv": who.FastadvStep,
}
SAMPLE: dict[str, Any] = {
    "plain PyTorch": who.BestSampleStep,
    "torch.compile": who.CompiledSampleStep,
    "fastadv": who.FastadvSampleStep,
}
PREPARE: dict[str, Any] = {"plain PyTorch": who.BestStep, "fastadv": who.FastadvStep}
BALLS = {"projected": Ball(0.3, 0.2), "inside the ball": Ball(0.3, 1e6)}  # what the projection costs

cached: dict[tuple[Any, ...], Result] = {}


def attack_race(entries: dict[str, Any], grad: Tensor, rounds: int, copy: Copy) -> Result:
    """Check that all agree after two steps, then time the second."""
    first, other = grad, grad.flip(0)
    same_embeddings(entries, entries["fastadv"].weight[entries["fastadv"].ids], first, other, 1e-4)

    def entry(step: Any) -> Entry:
        return Entry(lambda: [step.reset(), step.step(first)], lambda: step.step(other))

    return race({name: entry(step) for name, step in entries.items()}, rounds, copy)


def table_bytes(ids: Tensor, dimension: int) -> int:
    """dE read, W's touched rows read, r read and written, E written."""
    return 4 * dimension * (2 * ids.numel() + 3 * len(ids.unique()))


def sample_bytes(ids: Tensor, dimension: int) -> int:
    """dE read, W's touched rows read, delta read and written, E written."""
    return 4 * dimension * (4 * ids.numel() + len(ids.unique()))


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("contestant", [*TABLE, LIMIT])
@pytest.mark.parametrize("ball", BALLS)
def test_table(
    benchmark: Any,
    vocabulary: int,
    ball: str,
    contestant: str,
    size: Size,
    copy: Copy,
    rounds: Rounds,
    info: dict[str, Any],
) -> None:
    key = ("table", vocabulary, ball)
    ids = zipf(size.batch, size.length, vocabulary)
    if key not in cached:
        torch._dynamo.reset()
        weight, grad = table(vocabulary, size.dimension), gradient(ids.numel(), size.dimension)
        entries = {name: build(weight, ids, BALLS[ball]) for name, build in TABLE.items()}
        result = attack_race(entries, grad, rounds(31), copy)
        cached[key] = result.with_limit(table_bytes(ids, size.dimension))
    enter(benchmark, f"attack step, table scope, V {vocabulary:,}, {ball}", cached[key], contestant, info)


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("contestant", [*SAMPLE, LIMIT])
def test_sample(
    benchmark: Any, vocabulary: int, contestant: str, size: Size, copy: Copy, rounds: Rounds, info: dict[str, Any]
) -> None:
    key = ("sample", vocabulary)
    ids = zipf(size.batch, size.length, vocabulary)
    if key not in cached:
        torch._dynamo.reset()
        weight, grad = table(vocabulary, size.dimension), gradient(*ids.shape, size.dimension)
        entries = {name: build(weight, ids, BALLS["projected"]) for name, build in SAMPLE.items()}
        result = attack_race(entries, grad, rounds(51), copy)
        cached[key] = result.with_limit(sample_bytes(ids, size.dimension))
    enter(benchmark, f"attack step, sample scope, V {vocabulary:,}, projected", cached[key], contestant, info)


@pytest.mark.benchmark(timer=replay_clock)
@pytest.mark.parametrize("contestant", PREPARE)
def test_prepare(
    benchmark: Any, vocabulary: int, contestant: str, size: Size, copy: Copy, rounds: Rounds, info: dict[str, Any]
) -> None:
    """Once per batch: the sort; for plain PyTorch the touched rows too, which fastadv reads in every step."""
    key = ("prepare", vocabulary)
    if key not in cached:
        ids, weight = zipf(size.batch, size.length, vocabulary), table(vocabulary, size.dimension)
        steps = {name: build(weight, ids, BALLS["projected"]) for name, build in PREPARE.items()}
        slot = steps["fastadv"].groups.slot
        assert torch.equal(slot.flatten(), steps["plain PyTorch"].rows.inverse)
        cached[key] = race({name: Entry(step.reset, step.prepare) for name, step in steps.items()}, rounds(51), copy)
    enter(benchmark, f"a batch's preparation, table scope, V {vocabulary:,}", cached[key], contestant, info)


def enter(benchmark: Any, group: str, result: Result, contestant: str, info: dict[str, Any]) -> None:
    found = {**info, "contestant": contestant, "copy_bandwidth": result.bandwidth}
    report(benchmark, group, result.seconds[contestant], found)
