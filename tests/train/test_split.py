"""Who is tested: groups whole, classes with their share, and nothing that training never sees."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from fastadv.train import data
from fastadv.train.data import DataSettings
from fastadv.train.sources import Row
from fastadv.train.split import part, split
from tests.train.conftest import texts, write_csv


def rows_of(sizes: dict[str, int]) -> list[Row]:
    return [Row(f"{name} {number}", name) for name, size in sizes.items() for number in range(size)]


def by_class(rows: list[Row]) -> Counter[str]:
    return Counter(row.label for row in rows)


def test_each_class_keeps_its_share() -> None:
    """90 % in one class; a pair is one on each side, and a single row is trained on."""
    train, test = split(rows_of({"common": 900, "rare": 91, "pair": 2, "single": 1}), 0.2)
    assert by_class(test) == {"common": 180, "rare": 18, "pair": 1}
    assert by_class(train) == {"common": 720, "rare": 73, "pair": 1, "single": 1}
    assert [row.label for row in test[:40]].count("rare") < 18, "in random order"


@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 30), min_size=1),
    st.floats(0.05, 0.95),
    st.booleans(),
)
def test_a_split_is_whole_and_training_sees_every_class(sizes: dict[str, int], share: float, grouped: bool) -> None:
    rows = rows_of(sizes)
    if grouped:
        rows = [row._replace(group=str(number % 7)) for number, row in enumerate(rows)]
    train, test = split(list(rows), share)
    assert Counter(train + test) == Counter(rows)
    assert set(by_class(train)) == set(sizes)
    assert not grouped or not {row.group for row in train} & {row.group for row in test}
    backwards = split(rows[::-1], share)
    assert {row.text for row in backwards[1]} == {row.text for row in test} or grouped


def test_sets_that_training_would_not_see_are_trained_on() -> None:
    rows = [Row(f"text {number}", ("common",)) for number in range(40)]
    rows += [Row(f"odd {number}", ("common", f"rare {number}")) for number in range(40)]
    train, test = split(rows, 0.2)
    assert {name for row in test for name in row.label} == {"common"}
    assert len([row for row in train if len(row.label) == 2]) == 40


def test_a_part_has_every_class() -> None:
    rows = rows_of({"common": 50, "rare": 2, "single": 1})
    assert part(rows, 10) == [*rows[:8], rows[50], rows[52]]
    assert part(rows, 51)[:50] == rows[:50]
    assert len(part(rows, 1)) == 1


def test_rows_without_a_group_are_their_own(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "groups.csv", [], ("text", "label,film"))
    lines = [f"{text},{label},{'one film' if index < 5 else ''}" for index, (text, label) in enumerate(texts(50))]
    path.write_text("\n".join(["text,label,film", *lines]), encoding="utf-8")
    samples = data.load(DataSettings(str(path), group_column="film"))
    assert 5 <= len(samples.test) <= 15
