# ruff: noqa: ARG002 - transformers decides what its callbacks are given
"""Follow a training: a JSON Lines log, a progress bar, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, cast

from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from fastadv.integrations import files

if TYPE_CHECKING:
    from typing_extensions import Self

END = "train_runtime"  # in the row that the Trainer logs when it is through, or stopped


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
        with self.path.open("ab") as file:
            file.write((json.dumps(row) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())


def read_log(path: Path, phase: str | None = None) -> list[dict[str, Any]]:
    """Read a log, or the rows of one phase. A line that a crash cut off, within a character too, is skipped."""
    rows = []
    if path.exists():
        for line in path.read_bytes().split(b"\n"):
            try:
                row = json.loads(line)
                named, step = row["phase"], row["step"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if isinstance(step, int) and (phase is None or named == phase):
                rows.append(row)
    return rows


def rewind(path: Path, phase: str, step: int) -> None:
    """Drop the rows of `phase` after `step`, and of its end: a resumed training writes them again."""
    rows = [row for row in read_log(path) if row["phase"] != phase or (row["step"] <= step and END not in row)]
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows))


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


class Stop(TrainerCallback):
    """End training after the current step, with a checkpoint, on Ctrl-C or SIGTERM; at once on the second."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        try:
            self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: its owner handles signals
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested:
            control.should_save = control.should_training_stop = True
