"""Notice while a classifier trains that it has collapsed: one answer for everything, or a loss at chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastadv.methods import Method

WINDOW = 256  # samples that are judged together
ONE = 0.995  # share of one answer from which it is the only one
BALANCED = 0.8  # labels of which one has more are answered with it, rightly
CHANCE = 0.97  # part of the labels' entropy from which a loss is one of chance
PATIENCE = {"one answer": 0.2, "chance": 0.4}  # part of the training after which it is said
COUNTS, LOSS_SUM, SAID = "collapse.counts", "collapse.loss", "collapse"  # their names in a checkpoint

ANSWER = "the last {samples:.0f} samples got one answer, class {answer}, which {share:.0%} of them have"
LOSS = "the loss over the last {samples:.0f} samples is {loss:.3g}: guessing has the labels' entropy, {entropy:.3g}"
ADVICE = (
    "{method}: {what}. Is the attack too strong to learn under? Lower the radius{radius} (fastadv.suggest_radius finds "
    "one), or begin later with start_step=. Plain training that does no better needs another learning rate"
)


class Collapse:
    """Count answers, labels and losses of clean passes, on the device, and judge them window by window."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # [2, C]: answers and labels
        self._loss: Tensor | None = None
        self._said: set[str] = set()

    def add(self, output: Any, labels: Any, loss: Tensor) -> None:
        """Count a micro-batch, where it is one of single-label classification."""
        logits = output.get("logits") if isinstance(output, dict) else None
        if not (isinstance(logits, Tensor) and isinstance(labels, Tensor) and _classifies(logits, labels)):
            return
        if self._counts is None or self._loss is None:
            self._counts = torch.zeros(2, logits.shape[1], device=logits.device)
            self._loss = torch.zeros((), device=logits.device)
        self._counts, self._loss = self._counts.to(logits.device), self._loss.to(logits.device)  # of a checkpoint
        known = (labels >= 0).float()  # -100: no label
        self._counts[0].index_add_(0, logits.argmax(-1), known)
        self._counts[1].index_add_(0, labels.clamp(min=0), known)
        self._loss += loss.float() * known.sum()

    def read(self, method: Method, done: float) -> list[str]:
        """Say what is new, with what to change; this waits for the device. `done`: the part of the training that is."""
        if self._counts is None or self._loss is None:
            return []
        counts = self._counts.double().cpu()
        if counts[1].sum() < WINDOW:
            return []
        kind, what = _judged(counts[0], counts[1], float(self._loss))
        self._counts = None
        if what is None or done < PATIENCE[kind] or kind in self._said:
            return []
        self._said.add(kind)
        epsilon = getattr(method, "epsilon", None)
        radius = "" if epsilon is None else f" of {epsilon:.3g}"
        return [ADVICE.format(method=type(method).__name__, what=what, radius=radius)]

    # In a checkpoint

    def state(self) -> dict[str, Tensor]:
        """What is counted of the window that is open."""
        if self._counts is None or self._loss is None:
            return {}
        return {COUNTS: self._counts, LOSS_SUM: self._loss}

    def notes(self) -> dict[str, list[str]]:
        """What was said."""
        return {SAID: sorted(self._said)}

    def load_state(self, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        """Go on counting where `state` and `notes` were taken."""
        self._counts, self._loss = tensors.get(COUNTS), tensors.get(LOSS_SUM)
        self._said = set(notes.get(SAID, []))


def _judged(answers: Tensor, labels: Tensor, loss: float) -> tuple[str, str | None]:
    samples = float(labels.sum())
    share, top = labels / samples, int(answers.argmax())
    entropy = float(torch.special.entr(share).sum())
    if share.max() > BALANCED:
        return "", None
    if answers[top] >= ONE * samples:
        return "one answer", ANSWER.format(samples=samples, answer=top, share=float(share[top]))
    if loss / samples >= CHANCE * entropy:
        return "chance", LOSS.format(samples=samples, loss=loss / samples, entropy=entropy)
    return "", None


def _classifies(logits: Tensor, labels: Tensor) -> bool:
    fits = logits.dim() == 2 and logits.shape[1] > 1 and labels.dim() == 1 and len(labels) == len(logits)
    return fits and not labels.is_floating_point()
