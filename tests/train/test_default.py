"""The job with no options but a few that make it short: the model and data that two packages carry."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from fastadv.jobs.errors import UserError
from fastadv.jobs.method_options import methods, parameters
from fastadv.train import model
from fastadv.train.options import METHOD_DEFAULTS
from fastadv.train.sources import default_rows
from tests.train.command import main_ok

SHORT = ["--max-steps", "4", "--attack-samples", "16", "--attack-steps", "2"]


FEW = 320  # samples of the default data: testing on all of it takes longer than these trainings


@pytest.fixture(autouse=True)
def _default() -> None:
    try:
        model.resolve(model.DEFAULT)
        default_rows()
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_default_job() -> None:
    main_ok("train", "--output-dir", "run", *SHORT)
    result = json.loads(Path("run/result.json").read_text())
    data = result["settings"]["data"]
    assert (data["train_samples"], data["labels"]) == (3200, ["fresh", "rotten"])
    assert data["test_samples"] > 2000
    sane(result)


@pytest.mark.slow
@pytest.mark.parametrize("method", methods())
def test_every_method(method: str) -> None:
    with Path("few.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows((row.text, row.label) for row in default_rows()[:FEW])
    usual = METHOD_DEFAULTS.get(method, {}).get("epsilon", parameters(method).get("epsilon"))
    given = [] if usual is None else ["--epsilon", str(usual)]  # the default job looks for one
    main_ok("train", "--data", "few.csv", "--method", method, "--output-dir", "run", *SHORT, *given)
    sane(json.loads(Path("run/result.json").read_text()))


def sane(result: dict[str, Any]) -> None:
    for name in ("plain", "adversarial"):
        clean, *attacked = result["models"][name]["accuracy"]
        assert clean["total"] == result["settings"]["data"]["test_samples"]
        assert 0.3 < clean["accuracy"] < 0.9, "four steps of training"
        assert [cell["total"] for cell in attacked] == [16, 16]
    assert Path("run/report.html").stat().st_size > 10_000
