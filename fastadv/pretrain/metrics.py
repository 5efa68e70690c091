"""What a training logs: summed on the device, and read once per interval."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastadv.jobs.errors import UserError
from fastadv.jobs.log import append
from fastadv.jobs.memory import PeakMemory
from fastadv.pretrain.clock import attack_seconds
from fastadv.pretrain.step import Figures, Training

NOT_FINITE = (
    "step {step}: the gradient was not finite in {count} of the last {steps} steps, which were left out. Lower "
    "--learning-rate or the method's radius, and --resume from the last checkpoint, or train afresh"
)
MOST = 1  # steps of an interval that may be left out


class Meter:
    """Adds up figures between two rows of the log.

    A row is the same on any number of processes, but for times and memory: those are of the slowest and the largest.

    Args:
        training: whose figures they are.
        log: JSON Lines; written by the first process.
        phase: the training's name in it.
        memory: that is measuring the peak.
    """

    def __init__(self, training: Training, log: Path, phase: str, memory: PeakMemory) -> None:
        self._training = training
        self._log, self._phase, self._memory = log, phase, memory
        self._board = _board(log.parent / "tensorboard" / phase) if training.processes.first else None
        self.seconds = 0.0  # of all steps; a resumed training sets those before it
        self.tokens = 0
        self.left_out = 0
        self.peak = 0
        self._begin()

    def _begin(self) -> None:
        device = self._training.processes.device
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, adversarial, norm, left out
        self._steps = self._tokens = 0
        self._since = time.perf_counter()

    def add(self, figures: Figures) -> None:
        """Add one step; nothing waits for the device."""
        bad = ~figures.norm.isfinite()
        kept = torch.cat([figures.sums, figures.norm.reshape(1), bad.reshape(1)]).double()
        kept[:3].masked_fill_(bad, 0)
        self._sums += kept
        self._steps, self._tokens = self._steps + 1, self._tokens + figures.tokens
        self._rate = figures.rate

    def log(self, step: int) -> dict[str, Any] | None:
        """Write the row of the interval that ends after `step` steps, if it has any.

        Raises:
            UserError: the gradient was not finite more than once.
        """
        if not self._steps:
            return None
        spans = self._training.clock.read()
        sums = self._sums.tolist()  # here the device is waited for
        seconds = time.perf_counter() - self._since
        table = self._training.processes.table([*sums, seconds, attack_seconds(spans), float(self._peak())])
        row = self._row(step, table)
        if self._training.processes.first:
            append(self._log, row)
            _show(self._board, row)
        left_out, steps = row["left_out"], self._steps
        self._begin()
        if left_out > MOST:
            raise UserError(NOT_FINITE.format(step=step, count=left_out, steps=steps))
        return row

    def _row(self, step: int, table: list[list[float]]) -> dict[str, Any]:
        loss, adv_loss, norm, left_out, _, _, _ = (sum(column) / len(table) for column in zip(*table, strict=True))
        seconds, attack, peak = (max(column) for column in list(zip(*table, strict=True))[4:])
        steps = max(1, self._steps - round(left_out))
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + self._tokens
        self.left_out, self.peak = self.left_out + round(left_out), max(self.peak, round(peak))
        row = {
            "phase": self._phase,
            "step": step,
            "tokens": self.tokens,
            "loss": loss / steps,
            "adv_loss": adv_loss / steps,
            "grad_norm": norm / steps,
            "learning_rate": self._rate,
            "left_out": round(left_out),
            "seconds": seconds,
            "tokens_per_second": self._tokens / seconds,
            "attack_share": attack / seconds,
            "peak_memory": self.peak,
        }
        method = self._training.method
        if method is not None:
            row["perturbation_norm"] = float(method.perturbation_norm)
            row["skipped"] = int(method.skipped)
        return {name: None if isinstance(one, float) and not math.isfinite(one) else one for name, one in row.items()}

    def state(self) -> dict[str, Any]:
        """What a resumed training goes on from."""
        return {"seconds": self.seconds, "tokens": self.tokens, "left_out": self.left_out, "peak_memory": self.peak}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.seconds, self.tokens = float(state["seconds"]), int(state["tokens"])
        self.left_out, self.peak = int(state["left_out"]), int(state["peak_memory"])

    def _peak(self) -> int:
        device = self._training.processes.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else self._memory.peak

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()


def _board(folder: Path) -> Any:
    """Open TensorBoard's file, where that is installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call, unused-ignore]


def _show(board: Any, row: dict[str, Any]) -> None:
    for name, value in row.items() if board is not None else ():
        if isinstance(value, (int, float)) and name != "step":
            board.add_scalar(name, value, row["step"])
