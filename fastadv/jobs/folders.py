"""Find the models in the folder of a run. Light: it is read before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from fastadv.jobs.errors import UserError

SETTINGS, RESULT = "settings.json", "result.json"
PLAIN, ADVERSARIAL = "plain", "adversarial"


def models_of(folder: Path) -> dict[str, Path]:
    """List the models of a run, plain first; of a checkpoint, itself.

    Raises:
        UserError: there is no such folder, or it is a run that has no model yet.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder of a run, or of a model in it")
    if (folder / "config.json").exists() or not (folder / SETTINGS).exists():
        return {folder.resolve().name: folder}
    found = {name: folder / name for name in (PLAIN, ADVERSARIAL) if (folder / name / "config.json").exists()}
    if not found:
        raise UserError(f"{folder} has no trained model yet: fastadv train --resume --output-dir {folder} goes on")
    return found


def chosen(folder: Path, name: str | None) -> Path:
    """Find the one model that is meant: of a run, the adversarial one unless `name` says another.

    Raises:
        UserError: the run does not have it yet; or `name` is given with a checkpoint.
    """
    models = models_of(folder)
    if folder in models.values():
        if name is not None:
            raise UserError(f"--model chooses a model of a run, and {folder} is one model: leave it out")
        return folder
    name = name or ADVERSARIAL
    if name not in models:
        raise UserError(
            f"{folder} has no {name} model yet: --resume its training, or give --model {next(iter(models))}"
        )
    return models[name]
