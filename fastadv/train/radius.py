"""Choose the radius that a run was not given: `--epsilon auto`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import DataCollatorWithPadding

from fastadv import EmbeddingMethod, suggest_radius
from fastadv.engine.model.find import mean_row_norm
from fastadv.methods.radius_losses import SCALED, is_number, scaled
from fastadv.train.job import Job
from fastadv.train.model import place
from fastadv.train.options import AUTO, usual_radius

MINILM = 1.0656  # the mean row norm of the model that the job's usual radii were found for
NONE_FOUND = (
    "no radius was found, so that MiniLM's serves, for rows of this norm: {usual:.3g} (give --epsilon): {error}"
)


def chosen(job: Job, seed: int) -> tuple[Job, dict[str, Any] | None]:
    """Replace `auto` by the radius that `suggest_radius` finds for the model as training begins.

    Returns the job, and what the radius was found by; None where the job has a number. Where none can be found the
    job's usual radius serves, in units of the row norm, and the record has a "warning".
    """
    if job.method_arguments.get("epsilon") != AUTO:
        return job, None
    options = {name: value for name, value in job.method_arguments.items() if name != "epsilon"}
    args, method = job.arguments(Path("unused"), seed=seed), cast("type[EmbeddingMethod]", job.method)
    print(f"{method.__name__}: looking for a radius on training batches ...", file=sys.stderr)
    model, batches = place(job.build(seed), str(args.device)), _batches(job, args.per_device_train_batch_size)
    try:
        radius = suggest_radius(model, batches, method, learning_rate=args.learning_rate, **options)
        record = {"epsilon": float(radius), **vars(radius)}
    except RuntimeError as error:
        usual = usual_radius(method) * mean_row_norm(model, options.get("embedding")) / MINILM
        record = {"epsilon": usual, "warning": NONE_FOUND.format(error=error, usual=usual)}
    return replace(job, method_arguments=_rounded(scaled(options, record["epsilon"]))), record


def _rounded(arguments: dict[str, Any]) -> dict[str, Any]:
    radii = {name: float(f"{arguments[name]:.3g}") for name in ("epsilon", *SCALED) if is_number(arguments.get(name))}
    return {**arguments, **radii}


def _batches(job: Job, size: int) -> Iterator[Any]:
    collate, items = DataCollatorWithPadding(job.tokenizer), job.train.items
    for start in range(0, max(1, len(items) - size + 1), size):
        yield collate(items[start : start + size])


def describe(record: dict[str, Any]) -> str:
    """Say how a radius was chosen, in a sentence."""
    if "warning" in record:
        return str(record["warning"])
    relative = "" if record["relative"] is None else f" ({record['relative']:.3g} of the embedding's mean row norm)"
    learnt = f", after {record['fitted']} plain steps of a copy" if record["fitted"] else ""
    return (
        f"radius {record['epsilon']:.3g}{relative}: the loss of training batches rises from {record['loss']:.3g} to "
        f"{record['adv_loss']:.3g}{learnt}"
    )
