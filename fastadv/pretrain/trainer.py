"""One training, from a new model or from its last checkpoint: what the loop needs, put together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from fastadv.jobs.errors import Interrupted, UserError, writing
from fastadv.jobs.log import rewind
from fastadv.jobs.memory import PeakMemory
from fastadv.jobs.stop import Stop
from fastadv.pretrain import checkpoint, loop, methods, model
from fastadv.pretrain.blocks import wrap
from fastadv.pretrain.clock import Clock, Timed
from fastadv.pretrain.draws import key
from fastadv.pretrain.inputs import Inputs
from fastadv.pretrain.metrics import Meter
from fastadv.pretrain.optimizer import adamw
from fastadv.pretrain.processes import Processes
from fastadv.pretrain.settings import PLAIN_ONLY, Settings
from fastadv.pretrain.step import Training

CHECKPOINTS = "checkpoints"  # the folder of a training's checkpoints in that of the run, by its phase


class Trained(NamedTuple):
    """A trained model, and what it cost.

    Attributes:
        model: sharded where there are several processes.
        steps: that were trained, those of earlier processes included, as in all of these.
        seconds: of steps, their saves and logs; not of the model's making.
        tokens: that were predicted.
        left_out: steps whose gradient was not finite.
        peak_memory: bytes, of the process that had the most.
    """

    model: nn.Module
    steps: int
    seconds: float
    tokens: int
    left_out: int
    peak_memory: int


def prepare(
    settings: Settings, tokenizer: Any, method: str, options: Mapping[str, Any], processes: Processes
) -> Training:
    """Make a training that has not begun: model, checkpointing, compiler, shards, method and optimizer, in this order.

    Args:
        settings: of the job.
        tokenizer: whose tokens the model has.
        method: its name, or plain.
        options: its arguments, complete: see `methods.arguments`.
        processes: those that train together.

    Raises:
        UserError: a model or a method that cannot be.
    """
    network = model.build(settings, tokenizer)
    inputs = Inputs(network, settings, sharded=processes.world > 1)
    wrap(network, settings, processes)
    clock = Clock(processes.device)
    given = {name: value for name, value in options.items() if method != PLAIN_ONLY}
    attack = methods.make(method, network, given, Timed(clock))
    late = processes.world > 1 and options.get(methods.COMMUNICATION, "each") != "each"
    torch.manual_seed(key(settings.seed, processes.rank) >> 1)  # dropout, on each process another
    return Training(settings, processes, network, attack, adamw(network, settings), inputs, clock, late)


def pretrain(
    settings: Settings,
    folder: Path,
    phase: str,
    loader: Any,
    tokenizer: Any,
    *,
    method: str,
    options: Mapping[str, Any],
    processes: Processes,
    log: Path,
    stop: Stop,
    resume: bool = False,
) -> Trained:
    """Train one model.

    Args:
        settings: of the job.
        folder: of the run, which all processes share; checkpoints go to `checkpoints/PHASE` in it.
        phase: the training's name, in folders and in the log.
        loader: gives each step's micro-batches; put back to where a checkpoint was.
        tokenizer: whose tokens the model has.
        method: its name, or plain.
        options: its arguments, complete: see `methods.arguments`.
        processes: those that train together.
        log: JSON Lines.
        stop: that notes Ctrl-C.
        resume: go on from the newest checkpoint that is whole.

    Raises:
        Interrupted: somebody asked one of the processes to stop; a checkpoint is saved.
        UserError: a model or a method that cannot be, a checkpoint of another training, gradients that are not finite.
    """
    training = prepare(settings, tokenizer, method, options, processes)
    place = folder / CHECKPOINTS / phase
    saver = checkpoint.Saver(place, training, settings.keep)
    with writing(place, "--resume"), PeakMemory(processes.device) as memory:
        meter = Meter(training, log, phase, memory)
        first = _go_on(place, training, loader, meter, phase, method) if resume else 0
        if processes.first:
            rewind(log, phase, first)
        try:
            with _progress(phase, settings.max_steps, first, processes) as shown:
                done = loop.run(training, loader, meter, saver, first=first, stop=stop, shown=shown)
        finally:
            meter.close()
            if training.method is not None:
                training.method.close()
    if done < settings.max_steps:
        raise Interrupted(f"{phase}: stopped after step {done} of {settings.max_steps}")
    return Trained(training.model, done, meter.seconds, meter.tokens, meter.left_out, meter.peak)


def _go_on(place: Path, training: Training, loader: Any, meter: Meter, phase: str, method: str) -> int:
    """Put everything back to the newest whole checkpoint, and return its step; 0: there is none."""
    processes = training.processes
    if processes.first:
        checkpoint.clear(place)
    found: checkpoint.Found = processes.told(checkpoint.newest(place) if processes.first else None)
    say = _say if processes.first else _say_nothing
    for message in found.passed_over:
        say(f"{phase}: {message}")
    if found.folder is None:
        say(f"{phase}: no checkpoint is whole: begins afresh")
        return 0
    if found.state["method"] != method:
        raise UserError(f"{found.folder} is of method {found.state['method']}, not {method}: train afresh")
    same = checkpoint.load(found.folder, found.state, training)
    loader.load_state_dict(found.state["loader"])
    meter.resume(found.state)
    say(f"{phase}: goes on from {found.folder}")
    if not same:
        say(
            f"{phase}: {found.state['world']} processes saved it and {processes.world} go on: the rows are the same, "
            "sums are rounded otherwise, and dropout is drawn anew"
        )
    return int(found.state["step"])


@contextmanager
def _progress(phase: str, steps: int, first: int, processes: Processes) -> Iterator[Any]:
    """Show a bar, with the latest losses."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(total=steps, initial=first, desc=phase, unit="step", mininterval=interval, disable=not processes.first)

    def shown(done: int, row: dict[str, Any] | None) -> None:
        bar.update(done - bar.n)
        if row is not None:
            losses = {name: row[name] for name in ("loss", "adv_loss") if row[name] is not None}
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)

    with bar:
        yield shown


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _say_nothing(_: str) -> None:
    """What other processes than the first say."""
