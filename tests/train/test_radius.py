"""`--epsilon auto`: the radius of a run that was given none, and what is said of a radius that is too large."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastadv
from fastadv.jobs.errors import UserError
from fastadv.methods.radius import RISE
from fastadv.train import options
from fastadv.train.job import Settings, prepare
from fastadv.train.radius import chosen
from tests.train.command import main_ok, refused, train


def test_a_run_without_a_radius_finds_one(encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(encoder, table, "run", "--method", "pgd", "--learning-rate", "1e-2", "--attack-steps", "1")
    printed = capsys.readouterr().out
    result = json.loads((run / "result.json").read_text())
    found, arguments = result["radius"], result["settings"]["method_arguments"]
    assert found["adv_loss"] - found["loss"] == pytest.approx(RISE, rel=0.06)
    assert arguments["epsilon"] == pytest.approx(found["epsilon"], rel=0.01)
    assert arguments["step_size"] == pytest.approx(arguments["epsilon"] / 2, rel=0.01) and arguments["steps"] == 3
    assert f"radius {found['epsilon']:.3g} ({found['relative']:.3g} of the embedding's mean row norm)" in printed
    assert json.loads((run / "radius.json").read_text())["method_arguments"] == arguments


def test_a_resumed_run_keeps_its_radius(encoder: Path, table: Path) -> None:
    run = train(encoder, table, "run", "--learning-rate", "1e-2", "--attack-steps", "1")
    before = json.loads((run / "result.json").read_text())
    saved = json.loads((run / "radius.json").read_text())
    saved["method_arguments"]["epsilon"] = 0.123  # not what would be found again
    (run / "radius.json").write_text(json.dumps(saved))
    (run / "result.json").unlink()
    main_ok("train", "--resume", "--output-dir", "run")
    after = json.loads((run / "result.json").read_text())
    assert after["settings"]["method_arguments"] == {"epsilon": 0.123, "scope": "sample"}
    assert after["radius"] == before["radius"]


def test_where_none_is_found_the_usual_one_serves_in_units_of_the_rows(encoder: Path, table: Path) -> None:
    settings = Settings(model=str(encoder), extra=("--learning-rate", "1e-6"))
    job = prepare(settings)
    sized, record = chosen(job, 0)
    assert record is not None and "no radius was found" in record["warning"] and "has not learnt" in record["warning"]
    unit = float(job.build(0).get_input_embeddings().weight.detach().norm(dim=1).mean())
    assert sized.method_arguments["epsilon"] == pytest.approx(0.1 * unit / 1.0656, rel=0.01)


def test_steps_and_starts_keep_their_proportion() -> None:
    def complete(method: type[fastadv.Method], radius: str | None = None, **given: object) -> dict[str, object]:
        return options.arguments(method, given, radius)

    assert complete(fastadv.PGD, epsilon=0.02)["step_size"] == 0.01
    assert complete(fastadv.PGD, epsilon=0.02, step_size=0.02)["step_size"] == 0.02
    yopo = complete(fastadv.YOPO, options.AUTO)
    assert (yopo["epsilon"], yopo["step_size"], yopo["random_start"]) == ("auto", 0.2, 0.3)
    assert complete(fastadv.FGM) == {"epsilon": 0.1, "scope": "sample"}  # sweep's and compare's
    assert "epsilon" not in complete(fastadv.AWP, options.AUTO)
    with pytest.raises(UserError, match="--epsilon auto sets --step-size too"):
        complete(fastadv.PGD, options.AUTO, step_size=0.1)


def test_auto_is_for_methods_with_a_radius(encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("train", "--model", str(encoder), "--data", str(table), "--output-dir", "run", "--method", "pgd")
    assert "--epsilon auto sets --step-size too" in refused(capsys, *command, "--step-size", "0.1")


def test_a_sweep_finds_one_where_it_is_asked_to(encoder: Path, table: Path) -> None:
    command = ["sweep", "--model", str(encoder), "--data", str(table), "--output-dir", "swept", "--seeds", "0"]
    more = ["--learning-rate", "1e-2", "--max-steps", "3", "--attack-steps", "1", "--radii", "0.1"]
    main_ok(*command, *more, "--try", "fgm epsilon=auto,0.3")
    plain, auto, fixed = json.loads(Path("swept/sweep.json").read_text())["runs"]
    assert auto["radius"]["epsilon"] > 0 and "radius" not in plain and "radius" not in fixed


def test_an_attack_that_is_too_strong_is_told_while_it_trains(
    encoder: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="learns less than half of what it could"):
        run = train(
            encoder, table, "run", "--learning-rate", "3e-3", "--epsilon", "100", "--attack-steps", "1",
            "--logging-steps", "1", "--num-train-epochs", "10",
        )  # fmt: skip
    result = json.loads((run / "result.json").read_text())
    assert any("take a smaller radius" in warning for warning in result["warnings"])
    assert "learns less than half" in (run / "report.html").read_text()
