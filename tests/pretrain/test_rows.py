"""Packed rows: every token once an epoch, and each row by its number alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastadv.jobs.errors import UserError
from fastadv.pretrain.corpus import Corpus
from fastadv.pretrain.rows import Row, Rows
from tests.pretrain.texts import counted

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=12)
LENGTHS = st.integers(1, 50)


def whole(sizes: list[int], length: int, seed: int = 0) -> Rows:
    return Rows(counted(*sizes), np.arange(len(sizes)), length, seed)


def line(rows: Rows, tokens: int) -> list[int]:
    """The first tokens of all rows, one after another."""
    count = -(-tokens // rows.length)
    return [int(one) for number in range(count) for one in rows.row(number).ids][:tokens]


@given(SIZES, LENGTHS, st.integers(0, 2**32))
def test_every_token_comes_once_in_every_epoch(sizes: list[int], length: int, seed: int) -> None:
    rows, total = whole(sizes, length, seed), sum(sizes)
    found = line(rows, 3 * total)
    for epoch in range(3):
        assert sorted(found[epoch * total : (epoch + 1) * total]) == list(range(total))


@given(SIZES, LENGTHS)
def test_documents_are_whole_in_the_line_and_each_piece_counts_from_zero(sizes: list[int], length: int) -> None:
    """The oracle goes along the rows token by token: a piece goes on where the next token does, within a row."""
    rows, bounds = whole(sizes, length), np.cumsum([0, *sizes])
    begins, ends = set(bounds[:-1].tolist()), set((bounds[1:] - 1).tolist())
    before = None
    for number in range(2 * sum(sizes) // length + 1):
        row = rows.row(number)
        assert [len(one) for one in row] == [length] * 3
        assert {one.dtype for one in row} == {np.dtype(np.int64)}
        position, group = -1, -1
        for place, token in enumerate(row.ids.tolist()):
            starts = before is None or before in ends
            assert token in begins if starts else token == before + 1
            position, group = (0, group + 1) if starts or place == 0 else (position + 1, group)
            assert (row.positions[place], row.groups[place]) == (position, group)
            before = token


@given(SIZES, LENGTHS, st.lists(st.integers(0, 60), max_size=20))
def test_a_row_is_a_function_of_its_number(sizes: list[int], length: int, numbers: list[int]) -> None:
    used = whole(sizes, length)
    for number in numbers:
        same(used.row(number), whole(sizes, length).row(number))


def same(one: Row, other: Row) -> None:
    for mine, theirs in zip(one, other, strict=True):
        assert mine.tolist() == theirs.tolist()


def test_orders_differ_by_epoch_and_seed_and_are_spread() -> None:
    sizes = [1] * 500
    first, second = whole(sizes, 500), whole(sizes, 500, seed=1)
    orders = [rows.row(epoch).ids.tolist() for rows in (first, second) for epoch in range(2)]
    assert len({tuple(one) for one in orders}) == 4
    assert sorted(orders[0]) == list(range(500))
    for order in orders:
        assert abs(np.corrcoef(order, range(500))[0, 1]) < 0.2


def test_documents_that_do_not_count_are_in_no_row() -> None:
    rows = Rows(counted(3, 4, 5, 6), np.array([0, 2]), 4, 0)
    assert sorted(line(rows, 8)) == [0, 1, 2, 7, 8, 9, 10, 11]


def test_a_document_longer_than_many_rows_and_a_corpus_shorter_than_one() -> None:
    long = whole([1000], 7)
    assert line(long, 2000) == [*range(1000)] * 2
    short = whole([1, 2], 20).row(5)
    assert sorted(set(short.ids.tolist())) == [0, 1, 2]
    assert short.groups[-1] >= 12
    with pytest.raises(UserError, match="no document to make rows of: give more text"):
        Rows(counted(1), np.array([], np.int64), 4, 0)


def test_tokens_of_two_bytes_do_not_wrap() -> None:
    corpus = Corpus(np.array([65535, 0], np.uint16), np.array([0, 2]))
    assert Rows(corpus, np.arange(1), 4, 0).row(0).ids.tolist() == [65535, 0, 65535, 0]
