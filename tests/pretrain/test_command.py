"""The command as its user has it: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fastadv.jobs.log import read_log
from fastadv.pretrain import verdict
from fastadv.pretrain.command import RUNS
from tests.pretrain.job import arguments, pretrain, text
from tests.train.command import main_ok, refused
from tests.train.test_cli import Page


def test_a_whole_run(capsys: pytest.CaptureFixture[str]) -> None:
    result = pretrain("run", "--max-steps", "6", "--method", "PGD", "--steps", "1", "--attack-radii", "1,0.5")
    printed = capsys.readouterr().out
    assert list(result["trainings"]) == ["plain", "adversarial", "longer"]
    assert result["settings"]["method_name"] == "PGD"
    assert result["settings"]["method_arguments"]["steps"] == 1
    for name, training in result["trainings"].items():
        kinds = [(cell["kind"], cell["size"]) for cell in training["measured"]]
        assert kinds == [("clean", 0.0), ("attack", 0.5), ("attack", 1.0), ("noise", 0.05)]
        clean, weak, strong, _ = training["measured"]
        assert all(a <= b <= c for a, b, c in zip(*(cell["losses"] for cell in (clean, weak, strong)), strict=True))
        assert 1 < clean["low"] <= clean["perplexity"] <= clean["high"] < 330
        assert training["cost"]["steps"] == 6 or name == "longer"
        assert (training["cost"]["attack_share"] > 0.1) == (name == "adversarial")
        assert [row["step"] for row in read_log(Path("run/log.jsonl"), name)][:3] == [2, 3, 4]
    _, adversarial, longer = (training["cost"] for training in result["trainings"].values())
    assert longer["steps"] == round(6 / (1 - adversarial["attack_share"])) > 6
    assert not Path("run/checkpoints/plain").exists()
    for sentence in verdict.sentences(result):
        assert sentence in printed
    check_page(result["command"])


def check_page(command: str) -> None:
    page = Page()
    page.feed(Path("run/report.html").read_text())
    assert all(reference.startswith("#") for reference in page.references), "nothing is fetched"
    assert page.tags.count("svg") == 3
    assert command in page.text


def test_the_models_load(capsys: pytest.CaptureFixture[str]) -> None:
    """As anybody loads a model, and it is the one that was measured."""
    result = pretrain("run", "--max-steps", "3", "--no-plain", "--method", "fgm")
    assert list(result["trainings"]) == ["adversarial"]
    model = AutoModelForCausalLM.from_pretrained("run/adversarial").eval()
    tokenizer = AutoTokenizer.from_pretrained("run/adversarial")
    ids = tokenizer("the warm river", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "the warm river"
    with torch.no_grad():
        assert model(ids).logits.shape == (1, ids.shape[1], result["data"]["vocabulary"])
    assert result["model"] == {"class": "LlamaForCausalLM", "parameters": model.num_parameters()}


def test_a_masked_model() -> None:
    result = pretrain("run", "--max-steps", "2", "--objective", "masked", "--model", "small", "--method", "plain")
    assert list(result["trainings"]) == ["plain"]
    assert AutoModelForMaskedLM.from_pretrained("run/plain").config.model_type == "bert"
    clean = result["trainings"]["plain"]["measured"][0]
    assert 0 < sum(clean["tokens_each"]) < 100, "of eight short documents, the masked tokens alone"


def test_help_lists_options_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    main_ok("pretrain", "--help")
    shown = capsys.readouterr().out
    for wanted in ("Training:", "--warmup-steps", "--random-start 0.15", "freelb: ", "--resume", "torchrun"):
        assert wanted in shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epsilom", "1"], "there is no option --epsilom: did you mean --epsilon?"),
        (["--learning-rat", "1"], "did you mean --learning-rate?"),
        (["--method", "magic"], "pretraining has no method 'magic': choose one of plain, fgm"),
        (["--method", "fgm", "--steps", "2"], "there is no option --steps"),
        (["--scope", "batch"], "--scope batch puts the rows of a forward in one ball"),
        (["--max-steps", "0"], "--max-steps must be at least 1 and at most"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0"),
        (["--objective", "both"], "--objective must be causal or masked, not 'both'"),
        (["--dtype", "float16"], "--dtype must be float32, bfloat16 or float64"),
        (["--batch-tokens", "1000"], "--batch-tokens 1000 is no multiple of --length 128"),
        (["--attack-radii", "1,x"], "--attack-radii takes numbers above 0"),
        (["--streaming", "--data", "some/set"], "--streaming holds no documents out"),
        (["--method", "plain", "--no-plain"], "leave nothing to train"),
        (["--warmup-steps", "2.5"], "--warmup-steps must be a whole number, or a share"),
        (["--model", "./nowhere"], "./nowhere is no config"),
        (["--epsilon", "-1"], "freelb: epsilon must be finite and at least 0, not -1"),
        (["--resume"], "no unfinished run in runs/pretrain/"),
        (["--resume", "--seed", "1"], "--resume continues with the settings of the run: leave out --seed"),
        (["--resume", "--output-dir", "full"], "full holds no run"),
        (["--output-dir", "full"], "full is not an empty folder"),
    ],
)
def test_what_is_refused(capsys: pytest.CaptureFixture[str], given: list[str], message: str) -> None:
    Path("full").mkdir()
    Path("full/file").touch()
    text(Path("text.txt"), count=2)
    data = [] if "--data" in given or "--resume" in given else ["--data", "text.txt"]
    assert message in refused(capsys, "pretrain", *data, *given)


def test_a_typo_is_answered_before_torch_is_loaded() -> None:
    script = (
        "import sys\nfrom fastadv.cli import main\ntry:\n    main(['pretrain', '--epsilom', '1'])\n"
        "except SystemExit as left:\n    print(left.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]


def test_no_run_is_taken_for_one_of_the_other_job(capsys: pytest.CaptureFixture[str]) -> None:
    """`fastadv train --resume` looks for its own runs."""
    run = RUNS / "20260101-000000"
    run.mkdir(parents=True)
    (run / "settings.json").write_text(json.dumps({"command": "fastadv pretrain"}))
    assert "no unfinished run in runs/" in refused(capsys, "train", "--resume")


def test_missing_data_are_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    arguments()
    assert "nowhere.txt" in refused(capsys, "pretrain", "--data", "nowhere.txt", "--output-dir", "run")
    assert "nowhere.txt" in refused(capsys, "pretrain", "--data", "text.txt", "--eval-data", "nowhere.txt")
    assert not Path("run").exists()
