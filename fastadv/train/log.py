# ruff: noqa: ARG002 - transformers decides what its callbacks are given
"""Follow a training: a JSON Lines log, a progress bar, and Ctrl-C."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, cast

from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fastadv.jobs.log import append
from fastadv.jobs.stop import Stop


class JsonLines(TrainerCallback, ExportableState):
    """Append each row of the Trainer's log to a file, with its phase and the seconds of each step since the last.

    Seconds that are in no row yet are in every checkpoint. A row is on the disk before the checkpoint of its step.
    """

    def __init__(self, path: Path, phase: str) -> None:
        self.path = path
        self.phase = phase
        self._begun = 0.0
        self._seconds: list[float] = []

    def state(self) -> dict[str, dict[str, Any]]:
        return {"args": {}, "attributes": {"seconds": list(self._seconds)}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        callbacks = cast("dict[str, Any]", state.stateful_callbacks)  # as the checkpoint had them
        saved = callbacks.setdefault(type(self).__name__, self.state())
        self._seconds = list(saved["attributes"]["seconds"])

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._seconds.append(round(time.perf_counter() - self._begun, 5))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        row = {"phase": self.phase, "step": state.global_step, **(logs or {}), "step_seconds": self._seconds}
        self._seconds = []
        append(self.path, row)


class Progress(TrainerCallback):
    """Show one bar per training, with the latest losses."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        interval = 0.1 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.title, unit="step", mininterval=interval
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        shown = {name: f"{value:.3f}" for name, value in (logs or {}).items() if name in ("loss", "adv_loss")}
        if shown and self.bar is not None:
            self.bar.set_postfix(shown)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the bar, after an error too, so that its message starts on a new line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class StopTraining(TrainerCallback, Stop):
    """End training after the current step, with a checkpoint, on Ctrl-C or SIGTERM; at once on the second."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested:
            control.should_save = control.should_training_stop = True
