"""Train plainly and with many settings of the methods, to see which radius helps and what it costs."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadv.jobs import method_options
from fastadv.jobs.errors import UserError
from fastadv.jobs.shown import say, visible
from fastadv.jobs.writable import check_files
from fastadv.train import options, phase, radius
from fastadv.train.announce import announce
from fastadv.train.job import Job, Settings, prepare
from fastadv.train.kept import Kept, Point, as_read, check
from fastadv.train.metrics import score

RESULT = "sweep.json"


def points(tries: Sequence[str]) -> list[Point]:
    """Expand each --try to every combination of its values: `"fgm epsilon=0.1,0.2 scope=sample"` is two settings.

    Raises:
        UserError: an unknown method, a parameter that it does not have, or no value.
    """
    found: list[Point] = []
    for text in tries:
        name, *assignments = text.split()
        accepted = method_options.parameters(name)
        values: list[list[tuple[str, Any]]] = []
        for assignment in assignments:
            key, _, listed = assignment.partition("=")
            key = key.removeprefix("--").replace("-", "_")
            if key not in accepted:
                raise UserError(f"--try {text!r}: {name} has no parameter {key!r}; it takes {', '.join(accepted)}")
            if not listed:
                raise UserError(f"--try {text!r}: give {key} a value, or several with commas between")
            values.append([(key, method_options.literal(one)) for one in listed.split(",")])
        found += [(name.lower(), dict(chosen)) for chosen in itertools.product(*values)]
    return found


def run(settings: Settings, tries: Sequence[str], seeds: Sequence[int], folder: Path, command: str) -> dict[str, Any]:
    """Train and measure plainly and with every setting, seed by seed. The folder's JSON file keeps what is finished.

    Raises:
        UserError: `folder` holds a sweep on other data, or with other settings; or cannot be written to.
    """
    grid: list[Point] = [("plain", {}), *points(tries)]
    check_files(folder, [RESULT])
    check(folder / RESULT)
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


def train_all(job: Job, grid: Sequence[Point], seeds: Sequence[int], output: Path, command: str) -> dict[str, Any]:
    """Train every point of the grid with every seed that `output` (JSON) does not have yet.

    Another process may train points of the same file at the same time: what it has begun is left to it.

    Raises:
        UserError: `output` is damaged, or holds trainings on other data, or with other settings.
    """
    kept = Kept(output, command, common(job))
    announce(job)
    everything = list(itertools.product(seeds, grid))
    pending = list(enumerate(everything, 1))
    while pending:
        before, pending = (
            pending,
            [one for one in pending if not _trained(job, kept, *one, len(everything), wait=False)],
        )
        if pending == before:  # others train all of these: wait for the first, and train it should they fail
            say(f"{len(pending)} trainings are under way in another process: waiting for it")
            _trained(job, kept, *pending[0], len(everything), wait=True)
    kept.tidy()
    return kept.read()


def _trained(job: Job, kept: Kept, index: int, one: tuple[int, Point], total: int, *, wait: bool) -> bool:
    """Train a point unless that is done; False where another process is at it."""
    seed, (name, arguments) = one
    if kept.holds((name, arguments), seed):
        return True
    with kept.claimed((name, arguments), seed, wait=wait) as mine:
        if mine and not kept.holds((name, arguments), seed):
            kept.add(as_read(_one(job, name, arguments, seed, f"[{index}/{total}] ")))
        return mine


def _one(job: Job, name: str, arguments: dict[str, Any], seed: int, place: str) -> dict[str, Any]:
    title = visible(f"{place}{label(name, arguments)}, seed {seed}")
    adversary = found = None
    if name != "plain":
        method = method_options.method_class(name)
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
