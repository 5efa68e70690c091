"""Measure saved models on the test samples of their run, or on others: `fastadv evaluate`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastadv.integrations.files import write as write_whole
from fastadv.jobs.errors import UserError
from fastadv.jobs.folders import SETTINGS, models_of
from fastadv.jobs.json_file import write_json
from fastadv.jobs.surroundings import device_name, quiet, versions
from fastadv.train import data, plots, run_files
from fastadv.train.data import DataSettings, Sample
from fastadv.train.evaluate import Evaluator
from fastadv.train.labels import task_of
from fastadv.train.model import check_length, check_tokens, label_names, load_where_it_runs, longest, tokenizer_of
from fastadv.train.tokens import Tokens

FILES = ("evaluation.json", "evaluation.svg")


def evaluate(
    folder: Path,
    given: DataSettings | None,
    radii: Sequence[float],
    *,
    steps: int,
    samples: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a model on all test samples, and under PGD on the first `samples` of them (default: all).

    `folder` is a checkpoint, or a run: then every model in it is measured. `max_length`: as in training by default.

    Raises:
        UserError: `fastadv train` did not save this checkpoint, or its test samples cannot be found.
    """
    if not all(0 < radius < math.inf for radius in radii) or steps < 1 or (samples is not None and samples < 1):
        raise UserError("--radii must be above 0, --attack-steps and --attack-samples at least 1")
    if max_length is not None and max_length < 3:
        raise UserError(f"--max-length must be at least 3, not {max_length}")
    quiet(offline=given is None or given.data == data.DEFAULT or Path(given.data).exists())
    found = {}
    for name, checkpoint in models_of(folder).items():
        network = load_where_it_runs(checkpoint)
        check_length(network.config, max_length, checkpoint)
        labels, task = label_names(network), task_of(network.config.problem_type)
        test = _test_of_run(checkpoint, labels) if given is None else data.load_test(given, labels, task)
        tokenizer = tokenizer_of(str(checkpoint))
        tokens = Tokens(test, tokenizer, longest(tokenizer, max_length))
        check_tokens(network, (item["input_ids"] for item in tokens.items), checkpoint)
        evaluator = Evaluator(network, tokens, tokenizer, progress)
        found[name] = {"accuracy": evaluator.measure(samples, radii, steps)}
    return {
        "folder": str(folder),
        "data": None if given is None else given.data,
        "attack": {"method": "PGD", "steps": steps, "norm": "l2", "scope": "sample", "step_size": "radius / 4"},
        "models": found,
        "hardware": device_name(str(evaluator.device)),
        "versions": versions(),
    }


def _test_of_run(folder: Path, labels: list[str]) -> list[Sample]:
    """Load the samples that the run of this checkpoint was tested on."""
    for place in (folder.parent, folder.parent.parent):
        saved = run_files.begun(place / SETTINGS)
        if saved is not None:
            break
    else:
        raise UserError(
            f"{folder} does not lie in the folder of its run, so its test samples are not known: give --data"
        )
    samples = data.load(run_files.settings_of(saved["settings"]).data, labels)
    if data.fingerprint(samples.test) != saved.get("data", {}).get("test_fingerprint"):
        raise UserError(
            f"{samples.settings.data} has changed since the training: its test samples are not the same, and may have "
            "been trained on. Give --data"
        )
    return samples.test


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write evaluation.json and evaluation.svg, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in FILES]
    write_json(files[0], result)
    curves = {name: model["accuracy"] for name, model in result["models"].items()}
    picture = plots.radii(curves, result["attack"]["steps"])
    write_whole(files[1], picture)
    return files
