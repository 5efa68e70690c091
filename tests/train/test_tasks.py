"""Multi-label data and regression, from the file to the table; and how labels are read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig

from fastadv.jobs.errors import UserError
from fastadv.train import data, labels, model
from fastadv.train.data import DataSettings, Sample
from fastadv.train.evaluate import Evaluator
from fastadv.train.losses import losses
from fastadv.train.sources import Row
from fastadv.train.tokens import Tokens
from tests.train.command import evaluated, main_ok, refused, train
from tests.train.conftest import BAD, GOOD, texts, write_csv


def scored(count: int, offset: float = 0.0, scale: float = 1.0) -> list[tuple[str, str]]:
    """Texts with the share of good words among their good and bad ones; 1.5 decimals, as people rate."""
    generator, found = random.Random(3), {}
    while len(found) < count:
        words = generator.choices(GOOD + BAD, k=8)
        found[" ".join(words)] = f"{offset + scale * sum(word in GOOD for word in words) / 8:.4f}"
    return list(found.items())


def named(rows: list[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Texts with the classes of their words: good, bad, both or none."""
    return [
        (text, [name for name, words in (("bad", BAD), ("good", GOOD)) if set(words) & set(text.split())])
        for text, _ in rows
    ]


def json_lines(path: Path, rows: list[tuple[str, Any]]) -> Path:
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


MIXED = [
    *texts(60),
    *((f"the film {one} and {other}", "") for one in GOOD for other in BAD),
    *((f"a scene of {letter}", "") for letter in "abcd"),
]


@pytest.mark.parametrize(
    ("values", "separator", "task"),
    [
        (["good", "bad"], None, "classification"),
        ([0, 1, 2], None, "classification"),
        (["1.0", "0.0"], None, "classification"),
        (["0.5", "1", "2"], None, "regression"),
        ([0.5, 1.25], None, "regression"),
        (["0.5", "good"], None, "classification"),
        (["0.5", "NaN"], None, "classification"),
        ([["a"], []], None, "multi-label"),
        (["a|b", "a"], "|", "multi-label"),
    ],
)
def test_the_labels_tell_the_task(values: list[Any], separator: str | None, task: str) -> None:
    rows = [Row(str(number), value) for number, value in enumerate(values)]
    assert labels.choose_task("auto", rows, separator) == task
    assert labels.choose_task("classification", rows, separator) == "classification"


def test_integers_are_classes_in_the_order_of_their_values() -> None:
    rows = labels.read([Row("a", 10), Row("b", 2.0), Row("c", " 9 ")], "classification", None, "x")
    assert labels.class_names(rows) == ["2", "9", "10"]


def test_losses_are_those_of_transformers(encoder: Path) -> None:
    """By the same `problem_type` its own classifiers compute the same; and the mean is that of the samples."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    for task, targets, count in (
        ("classification", torch.tensor([0, 2, 1]), 3),
        ("multi-label", torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]]), 3),
        ("regression", torch.tensor([0.5, -1, 3]), 1),
    ):
        kind = labels.PROBLEM_TYPES[task]
        config = AutoConfig.from_pretrained(encoder, num_labels=count, problem_type=kind)
        theirs = AutoModelForSequenceClassification.from_config(config).eval()
        output = theirs(input_ids=torch.tensor([[2, 7, 3], [2, 8, 3], [2, 9, 3]]), labels=targets)
        mean, each = losses(kind, output.logits, targets)
        torch.testing.assert_close(mean, output.loss)
        torch.testing.assert_close(each.mean(), output.loss)
        assert each.shape == (3,)


def test_regression_end_to_end(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With prices in the thousands: the model learns them standardised, and answers in their unit."""
    table = write_csv(Path("prices.csv"), scored(100, 3000, 900))
    run = train(encoder, table, "run", "--num-train-epochs", "8")
    printed = capsys.readouterr()
    assert "task: regression (by the labels" in printed.out
    assert "labels: training 3112.5 to 3787.5" in printed.out
    result = json.loads((run / "result.json").read_text())
    assert result["settings"]["task"] == "regression"
    for name in ("plain", "adversarial"):
        clean, *attacked = result["models"][name]["accuracy"]
        assert clean["metric"] == "pearson" and clean["total"] == 20 == len(clean["predicted"])
        assert clean["low"] < clean["pearson"] < clean["high"]
        assert clean["pearson"] > 0.5, "it learns"
        assert clean["mse"] < 2 * 300**2, "in the unit of the prices, whose deviation is about 160"
        errors = [clean["mse"], *(cell["mse"] for cell in attacked)]
        assert errors == sorted(errors) and errors[0] < errors[-1]
    assert f"{clean['pearson']:.3f} [{clean['low']:.3f}" in printed.out
    config = json.loads((run / "plain" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    main_ok("evaluate", str(run / "plain"), "--radii", "0.1,0.2", "--attack-steps", "3")
    assert evaluated("run/plain") == result["models"]["plain"]["accuracy"]
    main_ok("evaluate", str(run / "plain"), "--data", str(table), "--radii", "0.1", "--output-dir", "all")
    assert evaluated("all")[0]["total"] == 100


def test_multi_label_end_to_end(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = json_lines(Path("sets.jsonl"), named(MIXED))
    run = train(encoder, table, "run", "--method", "llr")
    printed = capsys.readouterr()
    assert "task: multi-label (by the labels" in printed.out
    assert "training samples in no class: " in printed.out
    result = json.loads((run / "result.json").read_text())
    clean, *attacked = result["models"]["plain"]["accuracy"]
    assert len(clean["right"]) == clean["total"] and clean["right"].count("1") == clean["correct"]
    assert {"f1", "f1_micro"} <= set(clean)
    assert attacked[1]["correct"] <= attacked[0]["correct"] <= clean["correct"]
    config = json.loads((run / "plain" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert config["id2label"] == {"0": "bad", "1": "good"}
    other = write_csv(Path("other.csv"), [("a fine film", "good"), ("a dull fine film", "bad/good"), ("a film", "/")])
    main_ok("evaluate", str(run / "plain"), "--data", str(other), "--radii", "0.1", "--label-separator", "/")
    assert evaluated("run/plain")[0]["total"] == 3


def test_a_sweep_of_a_regression(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SMART and VAT compare two numbers by their squared difference, by themselves."""
    table = write_csv(Path("scores.csv"), scored(60))
    command = ["compare", "--model", str(encoder), "--data", str(table), "--output-dir", "out", "--max-steps", "2"]
    main_ok(*command, "--methods", "smart,vat", "--seeds", "0", "--radii", "0.1")
    runs = json.loads(Path("out/compare.json").read_text())["runs"]
    assert [run["accuracy"][0]["metric"] for run in runs] == ["pearson"] * 3
    assert "smart" in capsys.readouterr().out


def test_sets_of_classes_in_csv(tmp_path: Path) -> None:
    rows = [(text, ", ".join(found)) for text, found in named(MIXED) if found]
    path = write_csv(tmp_path / "sets.csv", rows)
    samples = data.load(DataSettings(str(path), label_separator=","))
    assert samples.labels == ["bad", "good"]
    assert {sample.label for sample in samples.train} == {(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)}
    with pytest.raises(UserError, match="say what is between the classes with --label-separator"):
        data.load(DataSettings(str(path), task="multi-label"))


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([("fine", "good"), ("dull", "0.5")], ["--task", "regression"], "'good', which is no number"),
        ([("fine", "0.5"), ("dull", "0.5")], ["--task", "regression"], "numbers to learn must differ"),
        ([("fine", "a"), ("dull", "b")], ["--task", "ranking"], "there is no --task ranking: choose one of auto"),
    ],
)
def test_labels_that_do_not_fit(
    encoder: Path, capsys: pytest.CaptureFixture[str], rows: list[tuple[str, str]], more: list[str], message: str
) -> None:
    table = write_csv(Path("odd.csv"), rows)
    assert message in refused(capsys, "train", "--model", str(encoder), "--data", str(table), *more)


def test_lists_are_no_classes(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "sets.jsonl", [("fine", ["a"]), ("dull", ["b"])])
    with pytest.raises(UserError, match=r"are lists .* --task multi-label"):
        data.load(DataSettings(str(path), task="classification"))


def by_hand(network: Any, item: dict[str, Any], radius: float, steps: int) -> torch.Tensor:
    """One sample's PGD on the squared error; returns the answer at its end."""
    ids, target = torch.tensor([item["input_ids"]]), torch.tensor([item["labels"]])
    delta = torch.zeros(1, ids.shape[1], 32, requires_grad=True)
    table = network.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, inputs, output: output + delta)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(F.mse_loss(network(ids).logits[:, 0], target), delta)
        with torch.no_grad():
            delta += radius / 4 * gradient / gradient.norm()
            delta *= min(1.0, radius / float(delta.norm()))
    with torch.no_grad():
        answer: torch.Tensor = network(ids).logits[0, 0]
    handle.remove()
    return answer


def test_the_attack_on_numbers(encoder: Path) -> None:
    """In batches as one by one, and of each sample the answer with the larger error counts."""
    torch.manual_seed(0)
    network = model.build(str(encoder), ["score"], 0.1, "regression")
    tokenizer = model.tokenizer_of(str(encoder))
    samples = [Sample(text, float(score)) for text, score in scored(20)]
    evaluator = Evaluator(network, Tokens(samples, tokenizer, 64), tokenizer, progress=False)
    clean, attacked = evaluator.measure(None, (0.2,), 5)
    targets = evaluator.targets
    answers = torch.stack([by_hand(network, item, 0.2, 5) for item in evaluator.data.items])
    before = torch.tensor(clean["predicted"])
    worse = torch.where((answers - targets).abs() > (before - targets).abs(), answers, before)
    torch.testing.assert_close(torch.tensor(attacked["predicted"]), worse, atol=1e-4, rtol=1e-4)
    assert attacked["mse"] == pytest.approx(float((worse - targets).square().mean()), rel=1e-3)
    expected = float(torch.corrcoef(torch.stack([worse, targets]))[0, 1])
    assert attacked["pearson"] == pytest.approx(expected, abs=1e-3)
