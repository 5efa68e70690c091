"""`fastadv predict`: its texts, its answers, and where they go."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch

from fastadv.train import model, predict
from tests.train.command import main_ok, refused
from tests.train.conftest import texts, write_csv

LABELS = ["bad", "good"]
TEXTS = [text for text, _ in texts(90)]


@pytest.fixture
def run(encoder: Path, tmp_path: Path) -> Path:
    """A run's folder with two models that differ."""
    folder = tmp_path / "run"
    for seed, name in enumerate(("plain", "adversarial")):
        torch.manual_seed(seed)
        model.build(str(encoder), LABELS, 0.1).save_pretrained(folder / name)
        tokenizer = model.tokenizer_of(str(encoder))
        tokenizer.model_max_length = 16
        tokenizer.save_pretrained(folder / name)
    (folder / "settings.json").write_text("{}")
    return folder


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_answers_are_the_models_in_the_order_of_the_texts(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In padded batches of several pools as one by one; of the adversarial model unless another is named."""
    monkeypatch.setattr(predict, "BATCH", 8)
    monkeypatch.setattr(predict, "POOL", 32)
    table = write_csv(Path("texts.csv"), [(text, "?") for text in TEXTS], header=("review", "x"))
    main_ok("predict", str(run), "--data", str(table), "--text-column", "review", "--output", "answers.jsonl")
    assert capsys.readouterr().out == ""
    found = lines(Path("answers.jsonl").read_text())
    assert [one["text"] for one in found] == TEXTS
    for name, answers in (("adversarial", found), ("plain", None)):
        if answers is None:
            main_ok("predict", str(run), *TEXTS[:5], "--model", name)
            answers = lines(capsys.readouterr().out)
        network, tokenizer = model.load_checkpoint(run / name), model.tokenizer_of(str(run / name))
        for text, one in zip(TEXTS, answers, strict=False):
            encoded = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")
            scores = network.eval()(encoded["input_ids"]).logits[0].softmax(-1).detach()
            assert one["label"] == LABELS[int(scores.argmax())]
            assert one["score"] == pytest.approx(float(scores.max()), abs=1e-6)
            assert one["scores"] == pytest.approx(dict(zip(LABELS, scores.tolist(), strict=True)), abs=1e-6)
    assert {one["label"] for one in found} == set(LABELS)


def test_standard_input_has_a_text_a_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a fine film\n\nthe dull story\n"))
    main_ok("predict", str(run / "plain"), "--data", "-")
    assert [one["text"] for one in lines(capsys.readouterr().out)] == ["a fine film", "the dull story"]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (None, {"label": "b", "score": 0.5, "scores": {"a": 0.25, "b": 0.5, "c": 0.25}}),
        (
            "multi_label_classification",
            {"labels": ["a", "b"], "scores": {"a": 0.5, "b": 2 / 3, "c": 1 / 2}},
        ),
        ("regression", {"scores": {"a": 0.0, "b": 0.6931, "c": 0.0}}),
    ],
)
def test_the_answer_follows_the_problem_type(problem: str | None, expected: dict[str, object]) -> None:
    logits = torch.tensor([0.0, 0.6931, 0.0])
    found = predict.answer(logits, ["a", "b", "c"], problem)
    if problem == "multi_label_classification":
        expected["labels"] = ["a", "b", "c"]  # a half counts
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert found[key] == (pytest.approx(value, abs=1e-4) if key not in {"labels", "label"} else value)


def test_a_single_number_is_a_score() -> None:
    assert predict.answer(torch.tensor([2.5]), ["value"], "regression") == {"score": 2.5}


def test_a_model_of_numbers_answers_with_one(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = model.build(str(encoder), ["stars"], 0.1, "regression").eval()
    network.save_pretrained("stars")
    tokenizer = model.tokenizer_of(str(encoder))
    tokenizer.save_pretrained("stars")
    write_csv(Path("texts.csv"), [("a fine film", "x"), ("", "y")])
    main_ok("predict", "stars", "--data", "texts.csv", "--skip-empty")
    (found,) = lines(capsys.readouterr().out)
    expected = network(tokenizer("a fine film", return_tensors="pt")["input_ids"]).logits.item()
    assert found == {"text": "a fine film", "score": pytest.approx(expected, abs=1e-6)}


def test_what_is_refused(run: Path, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = str(write_csv(Path("texts.csv"), [("a film", "x")]))
    for arguments, message in (
        ([str(run)], "no texts: give some"),
        ([str(run), "a film", "--data", table], "texts or --data, not both"),
        ([str(run), "--data", table, "--text-column", "txt"], "no column 'txt' (it has text, label)"),
        (["nowhere", "a film"], "there is no folder nowhere"),
        ([str(run / "plain"), "a film", "--model", "plain"], "is one model: leave it out"),
        ([str(encoder), "a film"], "a checkpoint of another model (bert)"),
        ([str(run), "a film", "--output", "no/where.jsonl"], "cannot be written"),
    ):
        assert message in refused(capsys, "predict", *arguments)
    for name in ("adversarial", "plain"):
        (run / name / "config.json").unlink()
        assert "--resume" in refused(capsys, "predict", str(run), "a film")
