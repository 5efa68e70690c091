"""A rank's batches: all ranks together have every row once, and a resumed loader goes on with the same ones."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastadv import packed
from fastadv.jobs.errors import UserError
from fastadv.pretrain.data import Data, prepare
from fastadv.pretrain.loader import Batch, Loader, rows_per_step
from fastadv.pretrain.prefetch import ahead
from tests.pretrain.texts import SMALL, sentences, settings

STEPS = 12


@pytest.fixture(scope="module", params=["causal", "masked", "streamed"])
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """80 short documents: 12 steps of 8 rows of 16 tokens are more than an epoch."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "measured.txt").write_text("a red fox\n")
    streamed = {"streaming": True, "eval_data": str(folder / "measured.txt")} if request.param == "streamed" else {}
    objective = "masked" if request.param == "masked" else "causal"
    return prepare(settings(folder, sentences(80, most=20), objective=objective, **streamed), folder / "run")


def steps(loader: Loader, count: int = STEPS) -> list[list[Batch]]:
    return list(itertools.islice(loader, count))


def by_row(found: list[list[Batch]]) -> dict[int, tuple[list[int], ...]]:
    """What each row is, by its number."""
    rows: dict[int, tuple[list[int], ...]] = {}
    for batch in itertools.chain(*found):
        for number, *values in zip(batch.rows.tolist(), *(one.tolist() for one in batch[:-1]), strict=True):
            assert number not in rows, "twice"
            rows[number] = tuple(values)
    return rows


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_rows_of_all_ranks_are_those_of_one(data: Data, world: int) -> None:
    alone = steps(data.loader())
    ranks = [steps(data.loader(rank, world)) for rank in range(world)]
    assert by_row(alone).keys() == set(range(STEPS * 8))
    together: dict[int, tuple[list[int], ...]] = {}
    for rank, found in enumerate(ranks):
        mine = by_row(found)
        assert {number % world for number in mine} == {rank}
        assert [len(one) for one in found] == [len(ranks[0][0])] * STEPS, "ranks have as many micro-batches"
        for step, batches in enumerate(found):
            assert {number // 8 for one in batches for number in one.rows.tolist()} == {step}
        together |= mine
    assert together == by_row(alone)


def test_a_loader_goes_on_after_each_step(data: Data) -> None:
    """Within an iteration and in a new loader; the state is JSON, whatever was made ahead."""
    whole = steps(data.loader())
    for done in range(STEPS):
        loader = data.loader()
        iterator = iter(loader)
        for _ in range(done):
            next(iterator)
        state = json.loads(json.dumps(loader.state_dict()))
        iterator.close()  # type: ignore[attr-defined]
        resumed = data.loader()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state, "before the first step too"
        equal(steps(resumed, STEPS - done), whole[done:])
        loader.load_state_dict(state)
        equal(steps(loader, 1), whole[done : done + 1])


def equal(one: list[list[Batch]], other: list[list[Batch]]) -> None:
    assert [len(step) for step in one] == [len(step) for step in other]
    for mine, theirs in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype == torch.int64 and torch.equal(a.cpu(), b)


def test_a_second_iteration_goes_on_where_the_first_was_left(data: Data) -> None:
    loader = data.loader()
    whole = steps(data.loader(), 4)
    equal([*steps(loader, 1), *steps(loader, 3)], whole)


def test_batches_are_what_models_and_methods_take(data: Data) -> None:
    loader, tokenizer = data.loader(), data.tokenizer
    for batches in steps(loader):
        assert [len(one.ids) for one in batches] == [3, 3, 2]
        for one in batches:
            assert {tuple(tensor.shape) for tensor in one[:4]} == {(len(one.rows), 16)}
            assert torch.equal(packed.from_position_ids(one.positions), one.groups)
            told = one.labels != -100
            if loader.masking is None:
                assert torch.equal(told, one.positions > 0)
                assert torch.equal(one.labels[told], one.ids[told])
            else:
                assert not torch.isin(one.labels[told], torch.tensor(tokenizer.all_special_ids)).any()
            ends = one.ids[:, :-1] == tokenizer.eos_token_id  # which is neither masked nor drawn
            assert torch.equal(one.groups[:, 1:] != one.groups[:, :-1], ends), "a document ends with eos, and only so"


def test_an_epoch_holds_every_document_once(tmp_path: Path) -> None:
    """From the file to the batches: what the tokens of an epoch spell are the documents to train on."""
    documents = [f"{number} {one}" for number, one in enumerate(sentences(60, most=12))]
    data = prepare(settings(tmp_path, documents, held_out=0.1), tmp_path / "run")
    assert data.train is not None
    ids = [one for batch in itertools.chain(*steps(data.loader(), 40)) for one in batch.ids.flatten().tolist()]
    spelt = data.tokenizer.decode(ids[: data.train.tokens]).split(data.tokenizer.eos_token)
    assert sorted(spelt) == sorted(["", *(documents[one] for one in data.train.numbers)])
    held_out = [data.tokenizer.decode(data.held_out.corpus[one][:-1]) for one in data.held_out.numbers]
    assert sorted([*spelt[:-1], *held_out]) == sorted(documents)


def test_prepare_says_what_it_found_and_does_nothing_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = settings(tmp_path, sentences(50), max_steps=7)
    data = prepare(chosen, tmp_path / "run", progress=True)
    said = capsys.readouterr().out
    assert data.train is not None and len(data.train.numbers) + len(data.held_out.numbers) == 50
    assert f"({data.train.tokens:,} tokens) to train on" in said and "text.txt" in said
    assert f"7 steps go through it {7 * 128 / data.train.tokens:.2g} times" in said
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    equal(steps(prepare(chosen, tmp_path / "run").loader()), steps(data.loader()))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_measuring_on_another_text_trains_on_all_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"text": "grey birds"}\n{"text": "near water"}')
    chosen = settings(tmp_path, sentences(30), eval_data=str(tmp_path / "other.jsonl"))
    data = prepare(chosen, tmp_path / "run")
    assert data.train is not None and len(data.train.numbers) == 30
    held_out = [data.tokenizer.decode(data.held_out.corpus[one][:-1]) for one in data.held_out.numbers]
    assert held_out == ["grey birds", "near water"]
    with pytest.raises(UserError, match="say with --eval-data what to measure on"):
        prepare(replace(chosen, eval_data=None, streaming=True), tmp_path / "streamed")


def test_little_text_is_gone_through_again_and_none_is_refused(tmp_path: Path) -> None:
    data = prepare(settings(tmp_path, ["a fox"]), tmp_path / "run")
    assert len(data.held_out.numbers) == 0, "of one document none is held out"
    (batch, *_), *_ = steps(data.loader(), 1)
    assert data.tokenizer.decode(batch.ids[0]).count("a fox") >= 3
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        prepare(settings(tmp_path, ["", " "]), tmp_path / "empty")


@given(st.integers(1, 200), st.integers(1, 32))
def test_ranks_share_a_step_or_the_error_says_which_numbers_do(rows: int, world: int) -> None:
    chosen = replace(SMALL, batch_tokens=rows * 16 + 15)
    if rows % world == 0:
        assert rows_per_step(chosen, world) == rows
        return
    with pytest.raises(UserError) as refused:
        rows_per_step(chosen, world)
    said = str(refused.value)
    fit = [int(one) for one in said.partition("start ")[2].partition(", or give")[0].replace(" or ", ", ").split(", ")]
    assert fit == [one for one in range(1, rows + 1) if rows % one == 0]
    tokens = int(said.rpartition(" ")[2])
    assert rows_per_step(replace(chosen, batch_tokens=tokens), world) >= rows


def test_a_step_without_a_row_is_refused() -> None:
    with pytest.raises(UserError, match="--batch-tokens 15 holds no row of --length 16"):
        rows_per_step(replace(SMALL, batch_tokens=15))


def test_what_is_made_ahead_comes_in_order_with_its_error_and_ends_with_its_reader() -> None:
    asked = []

    def items() -> Iterator[int]:
        for number in itertools.count():
            asked.append(number)
            if number == 50:
                raise ValueError("fifty")
            yield number

    def threads() -> list[Any]:
        return [one for one in threading.enumerate() if one.name == "fastadv-rows"]

    found: list[int] = []
    with pytest.raises(ValueError, match="fifty"):
        all(found.append(one) is None for one in ahead(items(), 2))
    assert found == list(range(50))
    assert len(asked) == 51 and not threads()
    asked.clear()
    some = ahead(items(), 2)
    assert [next(some), next(some)] == [0, 1]
    deadline = time.monotonic() + 10
    while len(asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(asked) == 5, "two were taken, two wait, and one is in hand"
    some.close()
    assert not threads()
    assert list(ahead(iter([]), 2)) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_wait_for_a_gpu_in_pinned_memory(data: Data) -> None:
    there = steps(data.loader(device="cuda"), 5)
    assert all(one.is_pinned() for batches in there for batch in batches for one in batch)
    equal(there, steps(data.loader(), 5))
