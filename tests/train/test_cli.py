"""The command as its user has it: what it prints and what it writes."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastadv.jobs.log import read_log
from fastadv.train import verdict
from tests.train.command import main_ok, refused, train
from tests.train.conftest import texts, write_csv


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
        assert "only_answer" in model
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
    for sentence in verdict.sentences(result):
        assert sentence in page.text
    check_examples(page, result)
    for name in ("plain", "adversarial"):
        cell = result["models"][name]["accuracy"][1]
        assert f"{100 * cell['accuracy']:.1f} % [{100 * cell['low']:.1f}, {100 * cell['high']:.1f}]" in page.text


def check_examples(page: Page, result: dict[str, Any]) -> None:
    found = result["examples"]
    assert sum(found["counts"].values()) == 24, "of every attacked sample"
    assert found["samples"]
    for sample in found["samples"]:
        right = [result["models"][name]["accuracy"][1]["right"][sample["index"]] for name in ("plain", "adversarial")]
        answers = [sample["models"][name]["attacked"]["answer"] for name in ("plain", "adversarial")]
        assert [mark == "1" for mark in right] == [answer == sample["label"] for answer in answers]
        assert f"Right answer: {sample['label']}" in page.text


def check_evaluate(run: Path, result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    main_ok("evaluate", str(run), "--radii", "0.1,0.2", "--attack-steps", "3")
    found = json.loads((run / "evaluation.json").read_text())
    assert list(found["models"]) == ["plain", "adversarial"]
    for name, model in found["models"].items():
        assert model["accuracy"] == result["models"][name]["accuracy"], "the same attack on the same test samples"
    assert (run / "evaluation.svg").read_text().startswith("<svg")
    other = write_csv(Path("other.csv"), [("a fine film", "good"), ("a dull film", "bad")])
    main_ok("evaluate", str(run / "plain"), "--data", str(other), "--radii", "0.1", "--output-dir", "elsewhere")
    other_found = json.loads(Path("elsewhere/evaluation.json").read_text())["models"]
    assert {name: model["accuracy"][0]["total"] for name, model in other_found.items()} == {"plain": 2}
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
    command += ["--output-dir", "swept", "--seeds", "0,1", "--try", "fgm epsilon=0.1,0.2 scope=sample"]
    main_ok(*command)
    saved = json.loads(Path("swept/sweep.json").read_text())
    tried = [(run["method"], run["arguments"].get("epsilon"), run["seed"]) for run in saved["runs"]]
    assert tried == [(m, e, s) for s in (0, 1) for m, e in (("plain", None), ("fgm", 0.1), ("fgm", 0.2))]
    assert "fgm epsilon=0.2 scope=sample" in capsys.readouterr().out
    for _ in range(2):  # the second time it is done
        main_ok(*command, "--try", "pgd steps=2 probe_dtype=bfloat16")
    again = json.loads(Path("swept/sweep.json").read_text())
    assert [run for run in again["runs"] if run["method"] != "pgd"] == saved["runs"], "what was done is kept"
    assert len(again["runs"]) == 8
    message = refused(capsys, *command[:-1], "fgm steps=2")
    assert "fgm has no parameter 'steps'" in message


def test_a_sweep_without_parameters_takes_those_of_the_job(encoder: Path, table: Path) -> None:
    """`--try fgm` is what `fastadv train --method fgm` trains with this job's usual radius."""
    run = train(encoder, table, "run", "--method", "fgm", "--epsilon", "0.1", "--max-steps", "3", "--seed", "7")
    command = ["sweep", "--model", str(encoder), "--data", str(table), "--output-dir", "swept", "--try", "fgm"]
    main_ok(*command, "--seeds", "7", "--max-steps", "3", "--num-train-epochs", "3", "--learning-rate", "1e-3")
    mine = json.loads((run / "result.json").read_text())["models"]["adversarial"]["accuracy"][0]
    (swept,) = [one for one in json.loads(Path("swept/sweep.json").read_text())["runs"] if one["method"] == "fgm"]
    assert swept["arguments"] == {}
    assert swept["accuracy"][0] == mine
