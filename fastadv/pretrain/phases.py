"""One of a run's trainings: train it, save the model, and measure it; what is done already is read."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastadv.integrations import files
from fastadv.jobs.conditions import Watch
from fastadv.jobs.errors import Interrupted
from fastadv.jobs.json_file import read_json, write_json
from fastadv.jobs.log import read_log
from fastadv.jobs.shown import say
from fastadv.jobs.stop import Stop
from fastadv.pretrain import checkpoint, methods, trainer
from fastadv.pretrain.data import Data
from fastadv.pretrain.measured import Texts, cells, losses
from fastadv.pretrain.model import HEADS, build
from fastadv.pretrain.processes import Processes
from fastadv.pretrain.settings import Settings
from fastadv.pretrain.together import first_alone, gathered, whole_weights

LOG, DONE = "log.jsonl", "phase.json"


def trained(settings: Settings, folder: Path, phase: str, data: Data, processes: Processes) -> dict[str, Any]:
    """Train, save the model in the phase's folder, and return the record of it; one that is there is read.

    Raises:
        Interrupted: stopped by its user; a checkpoint is saved.
        UserError: see `trainer.pretrain`.
    """
    record: dict[str, Any] | None = first_alone(processes, lambda: read_json(folder / phase / DONE))
    checkpoints = folder / trainer.CHECKPOINTS / phase
    if record is not None:
        if processes.first:
            shutil.rmtree(checkpoints, ignore_errors=True)  # of a run that was killed when its model was saved
        return record
    if processes.first:
        say(f"{phase}: {_described(settings)}")
    with Stop() as stop, Watch(resumed=any(checkpoint.whole_ones(checkpoints))) as watch:
        done = trainer.pretrain(
            settings,
            folder,
            phase,
            data.loader(processes.rank, processes.world, processes.device),
            data.tokenizer,
            method=settings.method,
            options=methods.arguments(settings.method, settings.extra),
            processes=processes,
            log=folder / LOG,
            stop=stop,
            resume=checkpoints.exists(),
        )
    weights = whole_weights(done.model)
    if processes.first:
        assert watch.conditions is not None
        told = {"device": str(processes.device), "conditions": asdict(watch.conditions)}
        record = {
            "phase": phase,
            "method": settings.method,
            "model": _save(settings, weights, data, folder / phase),
            "cost": {**_cost(done, read_log(folder / LOG, phase)), **told},
        }
        write_json(folder / phase / DONE, record)
        shutil.rmtree(checkpoints, ignore_errors=True)
    kept: dict[str, Any] = processes.told(record)
    if stop.requested and processes.world == 1:  # in the last step, which was done
        raise Interrupted(f"{phase}: trained, and stopped")
    return kept


def _described(settings: Settings) -> str:
    arguments = methods.arguments(settings.method, settings.extra)
    shown = ", ".join(f"{name}={value}" for name, value in arguments.items())
    how = f"{settings.method}({shown})" if shown else settings.method
    return f"{settings.max_steps:,} steps of {settings.batch_tokens:,} tokens, {how}"


def _cost(done: trainer.Trained, rows: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sum(row["seconds"] for row in rows)
    attack = sum(row["seconds"] * (row["attack_share"] or 0) for row in rows)
    return {
        "steps": done.steps,
        "tokens": done.tokens,
        "left_out": done.left_out,
        "seconds": done.seconds,
        "seconds_per_token": done.seconds / max(1, done.tokens),
        "tokens_per_second": done.tokens / max(1e-9, done.seconds),
        "attack_share": attack / max(1e-9, seconds),
        "peak_memory": done.peak_memory,
    }


def _save(settings: Settings, weights: Mapping[str, Any], data: Data, folder: Path) -> dict[str, Any]:
    """Save whole weights as transformers has models, with the tokenizer, and say what model it is."""
    model: Any = build(settings, data.tokenizer)
    model.load_state_dict(weights)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    data.tokenizer.save_pretrained(folder)
    files.sync_tree(folder)
    return {"class": type(model).__name__, "parameters": sum(one.numel() for one in model.parameters())}


def measured(
    settings: Settings, folder: Path, phase: str, record: dict[str, Any], texts: Texts, processes: Processes
) -> dict[str, Any]:
    """Measure a saved model, each process a part of the documents, and complete its record."""
    if "measured" in record:
        return record
    if processes.first:
        say(f"{phase}: measured on {len(texts.clean):,} documents")
    head = HEADS[settings.objective]
    model: Any = head.from_pretrained(folder / phase, use_safetensors=True, trust_remote_code=False)
    model.to(processes.device)
    mine = texts.part(processes.rank, processes.world)
    found = losses(model, mine, settings, progress=processes.first)
    whole = [gathered(processes, one) for one in found]
    record = {**record, "measured": cells(whole, texts, settings)}
    if processes.first:
        write_json(folder / phase / DONE, record)
    return record
