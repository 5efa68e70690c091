"""The numbers that a model is measured by, from its answers to all samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastadv.train.labels import CLASSIFICATION, MULTI_LABEL, REGRESSION

METRICS = {CLASSIFICATION: "accuracy", MULTI_LABEL: "accuracy", REGRESSION: "pearson"}
Z = 1.959964  # of a 95 % interval


def score(cell: Mapping[str, Any]) -> float:
    """Read the number that comes first: accuracy, or Pearson's r. Files of earlier versions hold accuracies alone."""
    value: float = cell[cell.get("metric", "accuracy")]
    return value


def right(task: str, outputs: Tensor, targets: Tensor) -> Tensor:
    """Tell which answers [N] are right: the class, or every one of several; of numbers none is."""
    if task == REGRESSION:
        return torch.zeros(len(targets), dtype=torch.bool)
    if task == MULTI_LABEL:
        return ((outputs > 0) == (targets > 0)).all(-1)
    return outputs.argmax(-1) == targets


def cell(task: str, radius: float, outputs: Tensor, targets: Tensor, correct: Tensor) -> dict[str, Any]:
    """Lay out for result.json how good the answers [N, C] are under an attack of this radius (0: none).

    `correct` [N]: those that no attack has turned. `right` has a 1 or 0 for each, by which two models are compared in
    pairs; the answers themselves (`predicted`) where they are numbers.
    """
    if task == REGRESSION:
        return _numbers(radius, outputs.squeeze(-1), targets)
    hits, total = int(correct.sum()), len(targets)
    low, high = wilson(hits, total)
    counts = {"radius": radius, "correct": hits, "total": total}
    share = {"accuracy": hits / total, "low": low, "high": high, "metric": METRICS[task]}
    scores = _f1_of_sets(outputs, targets) if task == MULTI_LABEL else {"f1": _f1_of_classes(outputs, targets)}
    return {**counts, **share, **scores, "right": "".join("01"[one] for one in correct.tolist())}


def _numbers(radius: float, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
    r = pearson(outputs, targets)
    low, high = fisher(r, len(targets))
    error = float((outputs.double() - targets.double()).square().mean())
    found = {"pearson": r, "low": low, "high": high, "metric": METRICS[REGRESSION], "mse": error}
    predicted = [float(f"{value:.5g}") for value in outputs.tolist()]
    return {"radius": radius, "total": len(targets), **found, "predicted": predicted}


def wilson(correct: int, total: int, z: float = Z) -> tuple[float, float]:
    r"""Compute Wilson's score interval of a share.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}
    """
    p = correct / total
    middle = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def pearson(outputs: Tensor, targets: Tensor) -> float:
    """Compute Pearson's correlation; 0 where one side is constant, which says nothing of the other."""
    x, y = (values.double() - values.double().mean() for values in (outputs, targets))
    scale = float(x.norm() * y.norm())
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale > 0 else 0.0


def fisher(r: float, total: int, z: float = Z) -> tuple[float, float]:
    r"""Compute Fisher's interval of a correlation. It needs four samples, and answers nothing below.

    .. math:: \tanh\Big(\operatorname{artanh} r \pm \frac{z}{\sqrt{n - 3}}\Big)
    """
    if total < 4:
        return -1.0, 1.0
    if abs(r) == 1:
        return r, r
    middle, spread = math.atanh(r), z / math.sqrt(total - 3)
    return math.tanh(middle - spread), math.tanh(middle + spread)


def _f1_of_classes(outputs: Tensor, targets: Tensor) -> float:
    """Macro F1 of single classes: the mean over those that are there or are answered."""
    classes = outputs.shape[-1]
    answers = outputs.argmax(-1)
    hits, answered, there = (
        torch.bincount(found, minlength=classes) for found in (targets[answers == targets], answers, targets)
    )
    return _macro(hits, answered, there)


def _f1_of_sets(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    answers, there = outputs > 0, targets > 0
    counts = [found.sum(0) for found in (answers & there, answers, there)]
    hits, answered, wanted = (int(count.sum()) for count in counts)
    return {"f1": _macro(*counts), "f1_micro": 2 * hits / max(1, answered + wanted)}


def _macro(hits: Tensor, answered: Tensor, there: Tensor) -> float:
    sizes = (answered + there).double()
    occurring = sizes > 0
    return float((2 * hits.double()[occurring] / sizes[occurring]).mean()) if bool(occurring.any()) else 0.0
