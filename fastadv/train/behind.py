# ruff: noqa: ARG002 - transformers decides what its callbacks are given
"""Say while a model trains adversarially that it learns much less than plain training did."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastadv.train.folders import PLAIN
from fastadv.train.log import read_log

AFTER = 0.4  # part of the training after which it is said
HALF = 0.5  # of what plain training has learnt by the same step
LATELY = 4  # rows of the log that are compared
BEHIND = (
    "after step {step} the clean loss is {loss:.3g}, and was {plain:.3g} in plain training: the model learns less than "
    "half of what it could. If it stays so, take a smaller radius (--epsilon), or begin later (--start-step)"
)


class Behind(TrainerCallback):
    """Compare the clean loss with plain training's in the same log, row by row."""

    def __init__(self, log: Path) -> None:
        self.plain = {row["step"]: row["loss"] for row in read_log(log, PLAIN) if "loss" in row}
        self.own: dict[int, float] = {}
        self.warnings: list[str] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs or state.global_step not in self.plain:
            return
        self.own[state.global_step] = logs["loss"]
        lately = list(self.own)[-LATELY:]
        if self.warnings or len(lately) < LATELY or state.global_step < AFTER * state.max_steps:
            return
        loss, plain = (sum(values[step] for step in lately) / LATELY for values in (self.own, self.plain))
        begun = self.plain[min(self.plain)]
        if begun - loss < HALF * (begun - plain):
            message = BEHIND.format(step=state.global_step, loss=loss, plain=plain)
            self.warnings.append(message)
            warnings.warn(message, stacklevel=2)
