"""Files, names and arguments that mean harm: one line that says what to do, and nothing that moves a terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fastadv.cli import main
from fastadv.jobs import page
from fastadv.jobs.errors import Interrupted, UserError
from fastadv.jobs.shown import say, visible, visible_json
from fastadv.train import compare, data, kept, plots, predict, run_files, tables
from fastadv.train.data import DataSettings
from fastadv.train.run import to_resume
from tests.campaigns.hostile_files import hostile_files
from tests.train.command import refused

ROWS = "".join(json.dumps({"text": f"t{i}", "label": "ab"[i % 2]}) + "\n" for i in range(20))
ESCAPES = "\x1b]0,x\x07\x9b31m\u202e\u2066"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("[" * 100_000, "line 21: lists or objects nested too deeply"),
        ('{"text": "x", "label": "a", "z": ' + "[" * 9000 + "]" * 9000 + "}", "line 21: lists or objects nested too"),
        ('{"text": "x", "label": ' + "1" * 5000 + "}", "line 21: a number of more than 4300 digits"),
        (r'{"text": "x\ud800", "label": "a"}', r"line 21: the text holds half a character (\ud800)"),
        (r'{"text": "x", "label": "\ud800"}', "line 21: the label holds half a character"),
        (r'{"text": "x", "label": ["a", "\ud800"]}', "line 21: the label holds half a character"),
        ('{"text": "x", "label": {"a": 1}}', "line 21: the label is an object"),
        ('{"text": "x", "label": [["a"]]}', "line 21: the label is a list of lists"),
        ('{"text": [[1]], "label": "a"}', "line 21: the text is a list"),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_json(row: str, message: str, ending: str) -> None:
    file = Path(f"hostile.{ending}")
    lines = [*ROWS.splitlines(), row]
    file.write_text("[" + ",\n".join(lines) + "]" if ending == "json" else "\n".join(lines))
    with pytest.raises(UserError) as refusal:
        data.load(DataSettings(data=str(file)))
    shown = str(refusal.value)
    assert str(file) in shown
    if ending == "jsonl":
        assert message in shown
    assert len(shown) < 300


@pytest.mark.parametrize("label", ["1" * 5000, 10**400, "1e400", 1e308, True, -0.0])
@pytest.mark.parametrize("task", ["auto", "regression"])
def test_numbers(label: Any, task: str) -> None:
    Path("numbers.jsonl").write_text(
        ROWS.replace('"a"', "1").replace('"b"', "2.5") + json.dumps({"text": "x", "label": label})
    )
    try:
        samples = data.load(DataSettings(data="numbers.jsonl", task=task))
    except UserError as error:
        assert len(str(error)) < 400  # noqa: PT017
    else:
        assert len(samples.train) + len(samples.test) == 21


def test_what_is_no_file() -> None:
    os.mkfifo("pipe.csv")
    Path("folder.csv").mkdir()
    for name, message in (("pipe.csv", "is no file, but a folder, a pipe"), ("x" * 5000 + ".csv", "does not exist")):
        with pytest.raises(UserError, match=message):
            data.load(DataSettings(data=name))
    with pytest.raises(UserError):
        data.load(DataSettings(data="folder.csv"))


SETTINGS = {"model": "m", "data": {"data": "d.csv"}, "attack_radii": [0.1], "extra": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            json.dumps({"command": "c", "settings": {**SETTINGS, "evil": 1}}),
            "there is no settings.evil|there is no evil",
        ),
        (json.dumps({"command": "c", "settings": {**SETTINGS, "data": {"evil": 1}}}), "there is no data.evil"),
        (
            json.dumps({"command": "c", "settings": {**SETTINGS, "max_length": "x"}}),
            "max_length must be a whole number",
        ),
        (
            json.dumps({"command": "c", "settings": {**SETTINGS, "attack_radii": [None]}}),
            r"attack_radii\[0\] must be a",
        ),
        (json.dumps({"settings": SETTINGS}), "command is missing"),
        (json.dumps({"command": "c", "settings": None}), "settings must be an object, not None"),
        ("[1]", "must be an object, not a list"),
        ("[" * 100_000, "cannot be read"),
        ("\0", "cannot be read"),
    ],
)
def test_settings_of_somebody_else(content: str, message: str) -> None:
    Path("run").mkdir()
    Path("run/settings.json").write_text(content)
    with pytest.raises(UserError, match=message) as refusal:
        to_resume(Path("runs"), Path("run"))
    assert "run/settings.json" in str(refusal.value)


def test_a_pipe_in_a_run() -> None:
    Path("run").mkdir()
    os.mkfifo("run/settings.json")
    with pytest.raises(UserError, match="is no file"):
        run_files.begun(Path("run/settings.json"))


CELL = {"radius": 0.0, "accuracy": 0.5, "low": 0.1, "high": 0.9, "total": 2}
RUN = {"method": "plain", "arguments": {}, "seed": 0, "seconds_per_step": 1.0, "accuracy": [CELL]}


@pytest.mark.parametrize(
    "content",
    [
        [], {}, {"command": "c", "job": [], "runs": []}, {"command": "c", "job": {}, "runs": [1]},
        {"command": "c", "job": {}, "runs": [{**RUN, "accuracy": []}]},
        {"command": "c", "job": {}, "runs": [{**RUN, "accuracy": [{**CELL, "metric": "pearson"}]}]},
        {"command": "c", "job": {}, "runs": [{**RUN, "seconds_per_step": "fast"}]},
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_a_damaged_file_of_trainings(content: Any, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told before the data are read, which are missing here."""
    Path("out").mkdir()
    Path(f"out/{command}.json").write_text(json.dumps(content))
    more = ["--try", "fgm"] if command == "sweep" else []
    message = refused(capsys, command, "--data", "nowhere.csv", "--output-dir", "out", *more)
    assert f"out/{command}.json is damaged" in message


def test_nothing_moves_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t.csv").write_text(f'"{ESCAPES}\nerror: another line",label\n1,2\n')
    message = refused(capsys, "train", "--data", "t.csv")
    assert r"\x1b]0,x\x07\x9b31m\u202e\u2066\nerror: another line" in message
    for arguments in (["predict", "a", f"--{ESCAPES}"], [ESCAPES], ["train", "--max-length", ESCAPES]):
        with pytest.raises(SystemExit):
            main(arguments)
        printed = capsys.readouterr()
        assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u2066"} & set(printed.out + printed.err)
    say(ESCAPES, Path("\udcff\n"))
    assert capsys.readouterr().out.count("\n") == 2
    assert str(Interrupted("a\x1bb")) == r"a\x1bb"
    assert visible("Grüße, 日本, e\u0301") == "Grüße, 日本, e\u0301"
    kept_as_it_was = json.dumps("\x1b\x9b\u202e\ud800é", ensure_ascii=False)
    assert json.loads(visible_json(kept_as_it_was)) == "\x1b\x9b\u202e\ud800é"
    assert visible_json(kept_as_it_was).isprintable()


def test_answers_move_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    predict.write(iter([{"text": ESCAPES, "label": "é"}]), None)
    printed = capsys.readouterr().out
    assert printed.strip().isprintable()
    assert json.loads(printed) == {"text": ESCAPES, "label": "é"}


NAMES = ["run$\\frac{1$x", "runs/[/x]/a", "[link=http://evil]click[/link]", "<script>", "a|b", ESCAPES, "$a$"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [CELL, {**CELL, "radius": 0.1}]
    assert "<script>" not in plots.radii({name: cells}, 3)
    result = {"folder": name, "models": {name: {"accuracy": cells}}, "attack": {"steps": 3}}
    tables.show(tables.evaluation(result))
    assert visible(name).split("/")[0][:12] in capsys.readouterr().out
    run = {**RUN, "accuracy": cells}
    rows = compare.summary([run, {**run, "method": "smart", "arguments": {"divergence": name}}])
    plots.methods(rows)
    last = compare.markdown(rows).splitlines()[-1]
    assert last.replace("\\|", "").count("|") == len(compare.headings(rows)) + 1
    assert "<" not in last
    assert "<script>" not in page.text(name)
    assert page.text(name).isprintable()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--seed", "-1"], ["--seed", str(2**32)], ["--num-train-epochs", "nan"], ["--num-train-epochs", "inf"],
        ["--per-device-train-batch-size", "0"], ["--gradient-accumulation-steps", "0"], ["--learning-rate", "nan"],
        ["--radii", "nan"], ["--radii", "1e400"],
    ],
)  # fmt: skip
def test_numbers_that_no_training_takes(
    arguments: list[str], encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert arguments[0] in refused(capsys, "train", "--data", str(table), "--model", str(encoder), *arguments)


@pytest.mark.parametrize("seeds", ["nan", "1.5", "-1", "1e30", ""])
def test_seeds(seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--seeds takes" in refused(capsys, "compare", "--output-dir", "out", "--methods", "fgm", "--seeds", seeds)


def test_trainings_of_an_earlier_version_are_read() -> None:
    Path("old.json").write_text(json.dumps({"command": "c", "job": {"data": {"settings": {}}}, "runs": [RUN]}))
    kept.check(Path("old.json"))
    assert kept.Kept(Path("old.json"), "c", {}).holds(("plain", {}), 0)


def test_a_part_of_the_campaign() -> None:
    found = hostile_files(60, 0)
    assert found["cases"] == 60
    assert not found["wrong"], found["details"]
    assert found["outcomes"]["refused"] > 10
    assert found["outcomes"]["worked"] > 2
