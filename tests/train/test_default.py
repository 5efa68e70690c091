"""The job with no options but a few that make it short: the model and data that two packages carry."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastadv.train import model
from fastadv.train.errors import UserError
from fastadv.train.options import METHOD_DEFAULTS, methods, parameters
from fastadv.train.sources import default_rows
from tests.train.command import main_ok

SHORT = ["--max-steps", "4", "--attack-samples", "16", "--attack-steps", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("method", methods())
def test_the_default_job(method: str) -> None:
    try:
        model.resolve(model.DEFAULT)
        default_rows()
    except UserError as error:
        pytest.skip(str(error))
    usual = METHOD_DEFAULTS.get(method, {}).get("epsilon", parameters(method).get("epsilon"))
    # Looking for a radius takes longer than these trainings: one method does.
    given = [] if method == "fgm" or usual is None else ["--epsilon", str(usual)]
    main_ok("train", "--method", method, "--output-dir", "run", *SHORT, *given)
    result = json.loads(Path("run/result.json").read_text())
    data = result["settings"]["data"]
    assert (data["train_samples"], data["labels"]) == (3200, ["fresh", "rotten"])
    for name in ("plain", "adversarial"):
        clean, *attacked = result["models"][name]["accuracy"]
        assert clean["total"] == data["test_samples"] > 2000
        assert 0.4 < clean["accuracy"] < 0.8, "four steps of training"
        assert [cell["total"] for cell in attacked] == [16, 16]
    assert Path("run/report.html").stat().st_size > 10_000
