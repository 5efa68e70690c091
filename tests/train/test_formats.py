"""Files as people have them, each really written and read."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fastadv.jobs.errors import UserError
from fastadv.train import data
from fastadv.train.data import DataSettings
from fastadv.train.sources import Columns, Found, file_rows
from tests.train.command import evaluated, main_ok, refused
from tests.train.conftest import texts, write_csv


def read(path: Path, **columns: Any) -> list[tuple[str, Any]]:
    return [(row.text, row.label) for row in file_rows(str(path), Columns(**columns)).rows]


def written(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_a_cell_of_a_million_characters(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    rows = [("a very " * 150_000 + "long film", "good"), ("a dull film", "bad")]
    assert read(write_csv(tmp_path / "long.csv", rows)) == rows
    (tsv := tmp_path / "long.tsv").write_text("\n".join("\t".join(row) for row in [("text", "label"), *rows]))
    assert read(tsv) == rows
    assert csv.field_size_limit() == before
    with pytest.raises(UserError, match="is a quote not closed"):
        read(written(tmp_path / "open.csv", f'text,label\n"{rows[0][0]},x\n'))
    assert csv.field_size_limit() == before


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_other_delimiters_in_csv(tmp_path: Path, delimiter: str) -> None:
    path = written(tmp_path / "other.csv", f'text{delimiter}label\n"a; b\tc, d"{delimiter}x\nfine, so{delimiter}y\n')
    assert read(path) == [("a; b\tc, d", "x"), ("fine, so", "y")]
    written(path, f"text{delimiter}label\na{delimiter}b{delimiter}c\n")
    with pytest.raises(UserError, match="not as many fields as the header has: quote the"):
        read(path)


def test_tsv_with_quotes_as_text(tmp_path: Path) -> None:
    """As GLUE has them: nothing is quoted, and a quote may stay open."""
    path = written(tmp_path / "raw.tsv", 'label\ttext\r\n1\t"fine" he said\r\n0\t"dull\r\n\r\n1\tan "odd" one"\r\n')
    assert read(path) == [('"fine" he said', "1"), ('"dull', "0"), ('an "odd" one"', "1")]


def test_tsv_with_quoted_cells(tmp_path: Path) -> None:
    """As spreadsheets write them: with quotes doubled, and tabs and newlines inside."""
    rows = [('he said "fine"', "x"), ("a\tb\tc\nd", "y"), ("plain", "z")]
    path = tmp_path / "quoted.tsv"
    for chosen in (rows[::2], rows):
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t").writerows([("text", "label"), *chosen])
        assert read(path) == chosen


def test_json_as_a_list_and_by_lines(tmp_path: Path) -> None:
    rows = [{"text": "fine", "label": 1}, {"text": "dull", "label": 0}]
    path = tmp_path / "rows.json"
    for content in (json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        assert read(written(path, content)) == [("fine", 1), ("dull", 0)]
    for content, message in (
        ('[{"text": "fine",}]', "line 1: not JSON"),
        ("[1, 2]", "row 1: a list of objects is expected, not int"),
        ('{\n"rows": []}', "one JSON object a line is expected"),
    ):
        with pytest.raises(UserError, match=message):
            read(written(path, content))


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="Parquet files need the package pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    columns = {"text": ["fine", "dull", None], "label": [0.5, 1.0, 2.0], "tags": [["a"], [], ["a", "b"]]}
    parquet.write_table(arrow.table(columns), path)
    assert read(path, skip_empty=True) == [("fine", 0.5), ("dull", 1.0)]
    assert read(path, label="tags", skip_empty=True) == [("fine", ["a"]), ("dull", [])]
    with pytest.raises(UserError, match=r"row 3: no text in column 'text'.*--skip-empty"):
        read(path)
    with pytest.raises(UserError, match=r"no column 'txt' \(it has text, label, tags\): set --text-column"):
        read(path, text="txt")
    with pytest.raises(UserError, match="cannot be read"):
        read(written(path, "no parquet"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = written(tmp_path / "rows.parquet", "")
    with pytest.raises(UserError, match="pip install pyarrow"):
        read(path)


def test_an_ending_that_is_no_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"names no format that can be read \(\.csv, \.tsv"):
        read(written(tmp_path / "rows.xlsx", "x"))


def test_rows_that_are_empty(tmp_path: Path) -> None:
    path = written(
        tmp_path / "rows.jsonl",
        "\n".join(
            json.dumps({"text": text, "label": label})
            for text, label in [("fine", "x"), ("", "x"), ("a", None), ("b", float("nan")), (None, "y"), ("c", "NaN")]
        ),
    )
    assert file_rows(str(path), Columns(skip_empty=True)) == Found([("fine", "x", None)], 5)  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"line 2: no text in column 'text': fill it, or .* --skip-empty"):
        read(path)
    with pytest.raises(UserError, match="has no rows with a text and a label"):
        read(written(path, '{"text": " ", "label": 1}'), skip_empty=True)


def test_skip_empty_says_how_many(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(write_csv(Path("gaps.csv"), [*texts(60), ("", "good"), ("a film", " "), ("the film", "NaN")]))
    command = ["train", "--model", str(encoder), "--data", table, "--max-steps", "1", "--attack-steps", "1"]
    assert "--skip-empty" in refused(capsys, *command)
    main_ok(*command, "--skip-empty", "--output-dir", "run")
    assert "rows left out: 3 without a text or label" in capsys.readouterr().out
    main_ok("evaluate", "run/plain", "--radii", "0.1", "--attack-steps", "1")
    main_ok("evaluate", "run/plain", "--data", table, "--skip-empty", "--radii", "0.1", "--attack-steps", "1")
    assert evaluated("run/plain")[0]["total"] == 60


@pytest.mark.parametrize("kind", ["csv", "parquet", "saved"])
def test_folders_through_datasets(tmp_path: Path, kind: str) -> None:
    """Files by split, and what `save_to_disk` leaves; classes come by their names."""
    datasets = pytest.importorskip("datasets", reason="folders need the package datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    parts = {}
    for split, rows in (("train", texts(60)[:40]), ("test", texts(60)[40:])):
        columns = {"text": [text for text, _ in rows], "label": [int(label == "good") for _, label in rows]}
        parts[split] = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path / "set"
    if kind == "saved":
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    for split, part in parts.items() if kind != "saved" else ():
        folder.mkdir(exist_ok=True)
        getattr(part, f"to_{kind}")(str(folder / f"{split}.{kind}"))
    samples = data.load(DataSettings(str(folder)))
    assert (len(samples.train), len(samples.test)) == (40, 20)
    assert samples.labels == (["0", "1"] if kind == "csv" else ["no", "yes"])


def test_sets_of_classes_through_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="folders need the package datasets")
    kind = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.Sequence(datasets.ClassLabel(names=["no", "yes"]))}
    )
    columns = {"text": [text for text, _ in texts(40)], "label": [[0], [1], [0, 1], []] * 10}
    datasets.Dataset.from_dict(columns, features=kind).save_to_disk(str(tmp_path / "set"))
    samples = data.load(DataSettings(str(tmp_path / "set")))
    assert (samples.task, samples.labels) == ("multi-label", ["no", "yes"])
    assert {sample.label for sample in samples.train} == {(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)}
