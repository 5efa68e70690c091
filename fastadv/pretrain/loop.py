"""The loop: a step, a row of the log, a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastadv.jobs.stop import Stop
from fastadv.pretrain.checkpoint import Saver
from fastadv.pretrain.metrics import Meter
from fastadv.pretrain.step import Training, train_step


def run(
    training: Training,
    loader: Any,
    meter: Meter,
    saver: Saver,
    *,
    first: int,
    stop: Stop,
    shown: Callable[[int, dict[str, Any] | None], None],
) -> int:
    """Train from step `first` to the last, or until somebody is asked to stop. Returns the steps that are done.

    Args:
        training: what is trained.
        loader: gives a list of micro-batches a step, and the `state_dict` of where it is.
        meter: sums up figures.
        saver: writes checkpoints. The log has a row up to each, so that a resumed training writes the same rows.
        first: the number of steps that were done before.
        stop: notes Ctrl-C.
        shown: takes the number of steps that are done, and the row of the log if there is one.

    Raises:
        UserError: gradients are not finite.
    """
    settings, done = training.settings, first
    batches = iter(loader)
    while done < settings.max_steps:
        figures = train_step(training, done, next(batches), stop=stop.requested)
        done += 1
        meter.add(figures)
        ends = figures.stop or done == settings.max_steps
        saves = ends or (settings.save_every > 0 and done % settings.save_every == 0)
        row = meter.log(done) if saves or done % settings.log_every == 0 else None
        if saves:
            saver.save(done, {**meter.state(), "loader": loader.state_dict()})
        saver.poll()
        shown(done, row)
        if ends:
            break
    saver.finish()
    return done
