"""Sum up the attacked steps between two lines of a Trainer's log."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastadv.methods import Method, StepResult


class Tally:
    """Keep sums over a logging interval, on the device."""

    def __init__(self) -> None:
        self.steps: set[int] = set()
        self.passes = 0
        self.sums: Tensor | None = None

    def add(self, result: StepResult, method: Method, step: int) -> None:
        if result.adv_loss is None:
            return
        values = torch.stack((result.adv_loss.float(), method.perturbation_norm.detach().float()))
        self.sums = values if self.sums is None else self.sums + values
        self.steps.add(step)
        self.passes += 1

    def read(self, accelerator: Any, method: Method) -> dict[str, float]:
        """Average over the attacked steps and over processes; a step's loss is the sum over its micro-batches.

        Raises:
            IndexError: a kernel met an id out of range since the last line.
        """
        assert self.sums is not None
        values = torch.cat((self.sums, method.skipped.float().reshape(1)))
        loss, norm, skipped = accelerator.reduce(values, "mean").tolist()
        method.check()  # the device has been waited for
        return {
            "adv_loss": loss / len(self.steps),
            "adv_norm": norm / self.passes,
            "adv_skipped": round(skipped * accelerator.num_processes),
        }
