"""Pretrain plainly and adversarially, measure the models, and write the result: `fastadv pretrain`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypedDict

from fastadv.jobs import run_folder, typed
from fastadv.jobs.errors import Interrupted, UserError, writing
from fastadv.jobs.folders import ADVERSARIAL, PLAIN, RESULT, SETTINGS
from fastadv.jobs.json_file import read_json, write_json
from fastadv.jobs.log import read_log
from fastadv.jobs.method_options import signature_of
from fastadv.jobs.shown import say
from fastadv.jobs.surroundings import command_line, device_name, quiet, versions
from fastadv.pretrain import before, methods, phases, report, tables, verdict
from fastadv.pretrain.corpus import ABOUT
from fastadv.pretrain.data import CORPUS, Data, prepare
from fastadv.pretrain.measured import measured_texts
from fastadv.pretrain.processes import Processes, started
from fastadv.pretrain.settings import LONGER, PLAIN_ONLY, Settings
from fastadv.pretrain.together import first_alone

REPORT = "report.html"
INTERRUPTED = 130  # the exit code of what Ctrl-C has ended
AFRESH = "Train afresh, with another --output-dir"


class Begun(TypedDict):
    """What settings.json holds."""

    command: str
    settings: dict[str, Any]


def in_processes(settings: Settings | None, folder: Path | None, runs: Path, arguments: Sequence[str]) -> None:
    """Run a job in all processes that torchrun started, or in this one. The first one prints, and makes the folder.

    Args:
        settings: of a new run, checked; None: an unfinished one goes on.
        folder: of the run; None: a new one in `runs`, or the unfinished one that was written to last.
        runs: where the folders of runs are.
        arguments: as the command was given them.

    Raises:
        UserError: see `run_folder.check`, `data.prepare`, `trainer.pretrain`.
        Interrupted: stopped by its user; it says how to go on.
    """
    quiet()
    with started() as processes, contextlib.ExitStack() as stack:
        command = command_line(arguments)
        if settings is not None:
            first_alone(processes, lambda: before.check(settings, processes.world))
        chosen, begun = first_alone(processes, lambda: _begun(stack, settings, folder, runs, command))
        place, goes_on = Path(chosen), f"fastadv pretrain --resume --output-dir {chosen}"
        wanted = typed.read(begun["settings"], Settings, place / SETTINGS, AFRESH)
        try:
            with writing(place, goes_on):
                result = run(wanted, place, begun["command"], processes)
        except (Interrupted, KeyboardInterrupt) as stopped:
            if not processes.first:  # one says it
                raise SystemExit(INTERRUPTED) from None
            raise Interrupted(f"{stopped or 'stopped'}; to continue: {goes_on}") from None
        if processes.first:
            tables.show(result)
            say(*verdict.doubts(result), *verdict.sentences(result), place / REPORT, place / RESULT)


def _begun(
    stack: contextlib.ExitStack, settings: Settings | None, folder: Path | None, runs: Path, command: str
) -> tuple[str, dict[str, Any]]:
    """Make the folder of a new run, or find the one that goes on, and hold it. Returns it with its settings.json."""
    if settings is not None:
        if folder is not None:
            run_folder.check(folder)
        begun = {"command": command, "settings": asdict(settings)}
        folder = stack.enter_context(run_folder.new(folder, runs, begun))
    else:
        if folder is None:
            folder, said = run_folder.latest_unfinished(runs)
            say(*said)
        if not (folder / SETTINGS).exists():
            raise UserError(f"{folder} holds no run ({SETTINGS} is missing): check --output-dir, or leave --resume out")
        stack.enter_context(run_folder.held(folder))
    return str(folder), dict(typed.read(read_json(folder / SETTINGS, AFRESH), Begun, folder / SETTINGS, AFRESH))


def run(settings: Settings, folder: Path, command: str, processes: Processes) -> dict[str, Any]:
    """Run the trainings of a job in `folder`, or go on with an interrupted one, and return the content of result.json.

    `folder` has its settings, and the first process holds it. The result is the last file that is written.

    Raises:
        Interrupted: stopped by its user; everything finished so far is in `folder`.
        UserError: data, model or method cannot be.
    """
    data = _data(settings, folder, processes)
    texts = measured_texts(data)
    records: dict[str, dict[str, Any]] = {}
    for phase, mine in _planned(settings, records):
        records[phase] = phases.trained(mine, folder, phase, data, processes)
    for phase, record in records.items():
        records[phase] = phases.measured(settings, folder, phase, record, texts, processes)
    result = _result(settings, command, records, _description(data, folder), processes)
    if processes.first:
        report.write(result, read_log(folder / phases.LOG), folder / REPORT)
        write_json(folder / RESULT, result)
    return result


def _data(settings: Settings, folder: Path, processes: Processes) -> Data:
    """Prepare the data, on the first process before all others."""
    kept: list[Data] = []
    first_alone(processes, lambda: kept.append(prepare(settings, folder, progress=True)))
    return kept[0] if kept else prepare(settings, folder)


def _description(data: Data, folder: Path) -> dict[str, Any]:
    """Lay out what was read for result.json. Of a text that is streamed nobody knows how long it is."""
    about, train = read_json(folder / CORPUS / ABOUT), data.train
    return {
        "text": data.settings.data if about is None else about["text"],
        "documents": None if train is None else len(train.numbers),
        "tokens": None if train is None else train.tokens,
        "held_out": len(data.held_out.numbers),
        "vocabulary": len(data.tokenizer),
    }


def _planned(settings: Settings, records: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Settings]]:
    """List the trainings with their settings; how long the last one is follows from the records of those before."""
    plain, adversarial = settings.trainings
    if plain:
        yield PLAIN, replace(settings, method=PLAIN_ONLY, extra=_sent(settings))
    if adversarial:
        yield ADVERSARIAL, settings
    if plain and adversarial and settings.same_time:
        # By its own clock: of two trainings one may have run beside other work.
        steps = round(settings.max_steps / (1 - records[ADVERSARIAL]["cost"]["attack_share"]))
        yield LONGER, replace(settings, method=PLAIN_ONLY, extra=_sent(settings), max_steps=steps)


def _sent(settings: Settings) -> tuple[str, ...]:
    """Give plain training the one option that it shares with methods: what is sent when, which changes times alone."""
    if settings.method == PLAIN_ONLY:
        return settings.extra
    given = methods.arguments(settings.method, settings.extra).get(methods.COMMUNICATION)
    return () if given is None else (f"--{methods.COMMUNICATION}", str(given))


def _result(
    settings: Settings, command: str, records: dict[str, dict[str, Any]], data: dict[str, Any], processes: Processes
) -> dict[str, Any]:
    first = next(iter(records.values()))
    plainly = settings.method == PLAIN_ONLY
    return {
        "command": command,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {
            **asdict(settings),
            "method_name": "plain" if plainly else signature_of(settings.method).name,
            "method_arguments": methods.arguments(settings.method, settings.extra),
        },
        "data": data,
        "model": first["model"],
        "processes": processes.world,
        "versions": versions(),
        "hardware": device_name(first["cost"]["device"]),
        "trainings": records,
    }
