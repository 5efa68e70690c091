"""Reading, checking and splitting."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fastadv.jobs.errors import UserError
from fastadv.train import data
from fastadv.train.data import DataSettings
from fastadv.train.sources import Columns, default_rows, file_rows
from fastadv.train.tokens import LengthGrouped
from tests.train.conftest import texts, write_csv


def settings(path: Path, **changes: object) -> DataSettings:
    return DataSettings(**{"data": str(path), **changes})  # type: ignore[arg-type]


def test_split_is_whole_disjoint_and_repeatable(table: Path) -> None:
    samples = data.load(settings(table))
    assert (len(samples.train), len(samples.test)) == (96, 24)
    both = Counter(sample.text for sample in samples.train + samples.test)
    assert both == Counter(text for text, _ in texts(120))
    assert samples.labels == ["bad", "good"]
    known = dict(texts(120))
    assert all(samples.labels[sample.label] == known[sample.text] for sample in samples.train)
    assert data.load(settings(table)) == samples


def test_the_order_of_the_file_does_not_decide_who_is_tested(tmp_path: Path, table: Path) -> None:
    turned = write_csv(tmp_path / "turned.csv", texts(120)[::-1])
    tests = [{sample.text for sample in data.load(settings(path)).test} for path in (table, turned)]
    assert tests[0] == tests[1]


def test_a_text_is_never_on_both_sides(tmp_path: Path) -> None:
    rows = texts(60)
    path = write_csv(tmp_path / "twice.csv", rows + [(f" {text.upper()}  ", label) for text, label in rows])
    samples = data.load(settings(path))
    assert len(samples.train) + len(samples.test) == 60
    test_file = write_csv(tmp_path / "test.csv", rows[:10])
    samples = data.load(settings(path, test_data=str(test_file)))
    assert len(samples.test) == 10
    assert len(samples.train) == 50


def test_groups_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "groups.jsonl"
    lines = [{"text": text, "label": label, "film": number % 12} for number, (text, label) in enumerate(texts(120))]
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    film = {line["text"]: line["film"] for line in lines}
    samples = data.load(settings(path, group_column="film"))
    sides = [{film[sample.text] for sample in side} for side in (samples.train, samples.test)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 2


def test_train_samples_are_a_part(table: Path) -> None:
    whole, part = data.load(settings(table)), data.load(settings(table, train_samples=10))
    assert part.train == whole.train[:10]
    assert part.test == whole.test


def test_csv_with_quotes_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes('\ufefftext,label\n"a, ""b""\nc",x\nd,y\n'.encode())
    assert [(row.text, row.label) for row in file_rows(str(path), Columns()).rows] == [('a, "b"\nc', "x"), ("d", "y")]


def test_a_folder_of_files_through_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="hub data sets need the package datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    write_csv(folder / "train.csv", texts(40), ("sentence", "class"))
    write_csv(folder / "test.csv", texts(60)[40:], ("sentence", "class"))
    samples = data.load(settings(folder, text_column="sentence", label_column="class"))
    assert (len(samples.train), len(samples.test)) == (40, 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\n", "has no rows"),
        ("", "has no rows"),
        ("sentence,label\nfine,x\n", "has no column 'text' (it has sentence, label): set --text-column"),
        ("text,label\nfine,x\ndull,x\n", "a classifier needs two classes"),
        ("text,label\nfine,x\n ,y\n", "line 3: no text in column 'text'"),
        ("text,label\nfine,x\ndull,\n", "line 3: no label in column 'label'"),
        ("text,label\nfine,x\ndull, grey,y\n", "line 3: not as many fields as the header has"),
        ("text,label\nfine,x\ndull\n", "line 3: not as many fields as the header has"),
        ('text,label\nfine,"x\n', "is a quote not closed?"),
        (b"text,label\n\xff,x\n", "is not UTF-8"),
    ],
)
def test_csv_errors(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        data.load(settings(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "fine", "label": 1}\nnot json\n', "line 2: not JSON"),
        ("[1, 2]\n", "line 1: one JSON object a line is expected, not list"),
        ('{"text": "fine"}\n', "has no column 'label'"),
        ('{"text": 3, "label": 1}\n', "line 1: the text is 3, which is none"),
        ('{"text": "fine", "label": null}\n', "line 1: no label"),
    ],
)
def test_json_lines_errors(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        data.load(settings(path))
    assert message in str(caught.value)


def test_a_label_that_training_never_saw(tmp_path: Path, table: Path) -> None:
    test = write_csv(tmp_path / "test.csv", [("a fine film", "good"), ("an odd film", "odd")])
    with pytest.raises(UserError, match=r"'odd', which was not seen in training .known: 'bad', 'good'."):
        data.load(settings(table, test_data=str(test)))


def test_batches_are_of_similar_length_and_follow_from_seed_and_epoch() -> None:
    lengths = [3 + (7 * index) % 31 for index in range(200)]
    sampler = LengthGrouped(lengths, 8, seed=1)
    first = list(sampler)
    assert sorted(first) == list(range(200))
    assert list(sampler) == first
    batches = [first[i : i + 8] for i in range(0, 200, 8)]
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spread) <= 3
    means = [lengths[batch[0]] for batch in batches]
    assert means != sorted(means), "the batches themselves must be shuffled"
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(LengthGrouped(lengths, 8, seed=2)) != first


def test_the_default_data() -> None:
    """Film reviews: plots left out, every text once, no film on both sides."""
    try:
        rows = default_rows()
    except UserError as error:
        pytest.skip(str(error))
    samples = data.load(DataSettings())
    film = {data._key(row.text): row.group for row in reversed(rows)}
    sides = [{film[data._key(sample.text)] for sample in side} for side in (samples.train, samples.test)]
    assert not sides[0] & sides[1]
    assert 12_000 < len(samples.train) + len(samples.test) < 12_800
    assert len(samples.test) > 2000
    assert samples.labels == ["fresh", "rotten"]
