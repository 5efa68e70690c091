# ruff: noqa: ARG002 - transformers decides what its callbacks are given
"""Say while a model trains adversarially that it learns much less than plain training did."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastadv.jobs.folders import PLAIN
from fastadv.jobs.log import read_log

AFTER = 0.4  # part of the training after which it is said
HALF = 0.5  # of what plain training has learnt by the same step
LATELY = 4  # rows of the log that are compared
BEHIND = (
    "after step {step} the clean loss is {loss:.3g}, and was {plain:.3g} in plain training: the model learns less than "
    "half of what it could. If it stays so, take a smaller radius (--epsilon), or begin later (--start-step)"
)


class Behind(TrainerCallback):
    """Compare the clean loss with plain training's in the same log, row by row."""

    def __init__(self, log: Path, phase: str) -> None:
        self.plain = _losses(log, PLAIN)
        self.own: dict[int, float] = {}
        self.warnings: list[str] = []
        self._log, self._phase = log, phase

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Know what was known when the training that goes on was stopped."""
        for step, loss in _losses(self._log, self._phase).items():
            self._add(step, loss, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is not None and "loss" in logs and self._add(state.global_step, logs["loss"], state.max_steps):
            warnings.warn(self.warnings[-1], stacklevel=2)

    def _add(self, step: int, loss: float, steps: int) -> bool:
        """Compare one more row; True where this is the one that shows it."""
        if step not in self.plain:
            return False
        self.own[step] = loss
        lately = list(self.own)[-LATELY:]
        if self.warnings or len(lately) < LATELY or step < AFTER * steps:
            return False
        loss, plain = (sum(values[one] for one in lately) / LATELY for values in (self.own, self.plain))
        begun = self.plain[min(self.plain)]
        if begun - loss >= HALF * (begun - plain):
            return False
        self.warnings.append(BEHIND.format(step=step, loss=loss, plain=plain))
        return True


def _losses(log: Path, phase: str) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_log(log, phase) if "loss" in row}
