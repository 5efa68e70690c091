"""Train plainly and with many settings of the methods, to see which radius helps and what it costs."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastadv.train import options, phase, radius
from fastadv.train.announce import announce
from fastadv.train.data import DataSettings
from fastadv.train.errors import UserError
from fastadv.train.job import Job, Settings, prepare, read_json, write_json
from fastadv.train.labels import CLASSIFICATION
from fastadv.train.metrics import score

Point = tuple[str, dict[str, Any]]
RESULT = "sweep.json"


def points(tries: Sequence[str]) -> list[Point]:
    """Expand each --try to every combination of its values: `"fgm epsilon=0.1,0.2 scope=sample"` is two settings.

    Raises:
        UserError: an unknown method, a parameter that it does not have, or no value.
    """
    found: list[Point] = []
    for text in tries:
        name, *assignments = text.split()
        accepted = options.parameters(name)
        values: list[list[tuple[str, Any]]] = []
        for assignment in assignments:
            key, _, listed = assignment.partition("=")
            key = key.removeprefix("--").replace("-", "_")
            if key not in accepted:
                raise UserError(f"--try {text!r}: {name} has no parameter {key!r}; it takes {', '.join(accepted)}")
            if not listed:
                raise UserError(f"--try {text!r}: give {key} a value, or several with commas between")
            values.append([(key, options.literal(one)) for one in listed.split(",")])
        found += [(name.lower(), dict(chosen)) for chosen in itertools.product(*values)]
    return found


def run(settings: Settings, tries: Sequence[str], seeds: Sequence[int], folder: Path, command: str) -> dict[str, Any]:
    """Train and measure plainly and with every setting, seed by seed. The folder's JSON file keeps what is finished.

    Raises:
        UserError: `folder` holds a sweep on other data, or with other settings.
    """
    grid: list[Point] = [("plain", {}), *points(tries)]
    return train_all(ready(settings, grid), grid, seeds, folder / RESULT, command)


def ready(settings: Settings, grid: Sequence[Point]) -> Job:
    """Prepare the job, with the first of the methods in it."""
    first = next((name for name, _ in grid if name != "plain"), None)
    return prepare(settings if first is None else replace(settings, method=first))


def common(job: Job) -> dict[str, Any]:
    """Describe what all trainings of a file have in common, as JSON has it."""
    own = ("method", "method_arguments", "overview")
    described = {name: value for name, value in job.description().items() if name not in own}
    shared: dict[str, Any] = as_read(described)
    return shared


def as_read(value: Any) -> Any:
    """Convert to what `read_json` will return: a dtype comes back as its name."""
    return json.loads(json.dumps(value, default=str))


def train_all(job: Job, grid: Sequence[Point], seeds: Sequence[int], output: Path, command: str) -> dict[str, Any]:
    """Train every point of the grid with every seed that `output` (JSON) does not have yet.

    Raises:
        UserError: `output` holds trainings on other data, or with other settings.
    """
    fresh: dict[str, Any] = {"command": command, "job": common(job), "runs": []}
    result: dict[str, Any] = read_json(output) or fresh
    known = _as_of_now(result["job"])
    different = [name for name, value in fresh["job"].items() if known.get(name) != value]
    if different:
        raise UserError(
            f"{output} holds trainings with other settings ({', '.join(different)}): give another --output-dir"
        )
    announce(job)
    everything = list(itertools.product(seeds, grid))
    for index, (seed, (name, arguments)) in enumerate(everything, 1):
        wanted = (name, as_read(arguments), seed)
        done = any((one["method"], one["arguments"], one["seed"]) == wanted for one in result["runs"])
        if not done:
            finished = _one(job, name, arguments, seed, f"[{index}/{len(everything)}] ")
            result = read_json(output) or fresh  # another process may have added to it
            result["runs"].append(finished)
            output.parent.mkdir(parents=True, exist_ok=True)
            write_json(output, result)
    return result


def _as_of_now(saved: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a file of an earlier version does not say, since there was no choice."""
    data = saved["data"]
    return {
        "task": CLASSIFICATION,
        **saved,
        "data": {**data, "settings": {**asdict(DataSettings()), **data["settings"]}},
    }


def _one(job: Job, name: str, arguments: dict[str, Any], seed: int, place: str) -> dict[str, Any]:
    title = f"{place}{label(name, arguments)}, seed {seed}"
    adversary = found = None
    if name != "plain":
        method = options.method_class(name)
        mine = replace(job, method=method, method_arguments=options.arguments(method, arguments))
        mine.check_adversary(seed)
        mine, found = radius.chosen(mine, seed)
        adversary = mine.adversary
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        model, cost, warnings = phase.train(job, title, Path(folder), log, adversary, seed=seed, save_strategy="no")
        accuracy = phase.measure(job, model)
    return {
        "method": name,
        "arguments": arguments,
        "seed": seed,
        **({} if found is None else {"radius": found}),
        **({"warnings": warnings} if warnings else {}),
        "seconds_per_step": cost.seconds_per_step,
        "peak_memory": cost.peak_memory,
        "steps": cost.steps,
        "accuracy": accuracy,
    }


def label(name: str, arguments: dict[str, Any]) -> str:
    """Spell a setting on one line."""
    return " ".join([name, *(f"{key}={value}" for key, value in arguments.items())])


def summary(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Summarise each setting: means over its seeds, and the difference of clean accuracy to plain training's.

    The difference is taken seed by seed, over the seeds that both have.
    """
    runs = list(runs)
    plain = {one["seed"]: score(one["accuracy"][0]) for one in runs if one["method"] == "plain"}
    rows = []
    for name in dict.fromkeys(label(one["method"], one["arguments"]) for one in runs):
        mine = [one for one in runs if label(one["method"], one["arguments"]) == name]
        columns = zip(*(one["accuracy"] for one in mine), strict=True)
        differences = [score(one["accuracy"][0]) - plain[one["seed"]] for one in mine if one["seed"] in plain]
        rows.append(
            {
                "setting": name,
                "seeds": [one["seed"] for one in mine],
                "accuracy": {cells[0]["radius"]: _mean([score(cell) for cell in cells]) for cells in columns},
                "difference": _mean(differences) if differences else None,
                "seconds_per_step": _mean([one["seconds_per_step"] for one in mine]),
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
