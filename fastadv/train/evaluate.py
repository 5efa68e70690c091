# mypy: disable-error-code="no-untyped-call"
"""Measure the accuracy of a classifier, clean and under an attack on its word embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from fastadv import PGD
from fastadv.train.data import Tokens
from fastadv.train.model import MeanPoolClassifier

BATCH = 64


@dataclass(frozen=True)
class Accuracy:
    """Say which answers are right under an attack of radius `radius` (0: none)."""

    radius: float
    right: tuple[bool, ...]  # the measured samples in their order

    @classmethod
    def of(cls, radius: float, right: Iterable[int], total: int) -> Accuracy:
        """Mark the samples `right` among the first `total`."""
        found = set(right)
        return cls(radius, tuple(index in found for index in range(total)))

    @property
    def correct(self) -> int:
        """Number of correct answers."""
        return sum(self.right)

    @property
    def total(self) -> int:
        """Number of samples."""
        return len(self.right)

    @property
    def value(self) -> float:
        """Share of correct answers."""
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval by Wilson's formula."""
        return wilson(self.correct, self.total)

    def as_dict(self) -> dict[str, Any]:
        """Lay it out for result.json. `right`: a 1 or 0 per sample, by which two models can be compared in pairs."""
        low, high = self.interval
        counts = {"radius": self.radius, "correct": self.correct, "total": self.total}
        right = "".join("01"[one] for one in self.right)
        return {**counts, "accuracy": self.value, "low": low, "high": high, "right": right}


def wilson(correct: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    r"""Compute Wilson's score interval of a share.

    .. math:: \frac{p + z^2/2n \pm z \sqrt{p(1-p)/n + z^2/4n^2}}{1 + z^2/n}
    """
    p = correct / total
    middle = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


class Evaluator:
    """Run one model over one data set, in batches of similar length."""

    def __init__(self, model: MeanPoolClassifier, data: Tokens, tokenizer: Any, progress: bool = True) -> None:
        self.model = model.eval()
        self.data = data
        self.pad = tokenizer.pad_token_id
        self.device = next(model.parameters()).device
        self.progress = progress

    def clean(self) -> list[int]:
        """List the samples that the model classifies correctly."""
        right: list[int] = []
        with torch.inference_mode(), self._bar("clean", len(self.data)) as bar:
            for indices, batch in self._batches(range(len(self.data))):
                logits = self.model(batch["input_ids"], batch["attention_mask"]).logits
                right += _kept(indices, logits, batch["labels"])
                bar.update(len(indices))
        return right

    def attacked(self, right: Sequence[int], total: int, radii: Sequence[float], steps: int) -> list[Accuracy]:
        """Measure accuracy under PGD at each radius over `total` samples. `right`: those correct without an attack.

        The ball is each sample's: the l2 norm over its tokens. PGD starts at zero, and takes steps of radius / 4.
        A sample that is wrong already needs no attack, and what an attack of a smaller radius found lies inside the
        larger ball too: both count as wrong, and only the others are attacked.
        """
        results = []
        for radius in sorted(radii):
            right = self._survivors(right, radius, steps)
            results.append(Accuracy.of(radius, right, total))
        return results

    def _survivors(self, right: Sequence[int], radius: float, steps: int) -> list[int]:
        attack = PGD(self.model, epsilon=radius, step_size=radius / 4, steps=steps, norm="l2", scope="sample")
        kept: list[int] = []
        try:
            with self._bar(f"PGD-{steps}, radius {radius:g}", len(right)) as bar:
                for indices, batch in self._batches(right):
                    kept += _kept(indices, self._attack(attack, batch), batch["labels"])
                    bar.update(len(indices))
        finally:
            attack.close()
        return kept

    def _attack(self, attack: PGD, batch: dict[str, Tensor]) -> Tensor:
        """Compute the logits at the perturbation that the attack finds."""

        def loss() -> Tensor:
            output: Tensor = self.model(**batch).loss
            return output * len(batch["labels"])  # the sum: no sample's gradient shrinks with the batch

        with attack.perturbed(loss, mask=batch["attention_mask"]), torch.no_grad():
            logits: Tensor = self.model(batch["input_ids"], batch["attention_mask"]).logits
        return logits

    def _batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        items = self.data.items
        order = sorted(indices, key=lambda index: len(items[index]["input_ids"]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            yield chosen, self._collate([items[index] for index in chosen])

    def _collate(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        ids = torch.full((len(items), width), self.pad)
        mask = torch.zeros((len(items), width), dtype=torch.long)
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            ids[row, :length] = torch.tensor(item["input_ids"])
            mask[row, :length] = torch.tensor(item["attention_mask"])
        labels = torch.tensor([item["labels"] for item in items])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return {name: value.to(self.device) for name, value in batch.items()}

    def _bar(self, what: str, total: int) -> Any:
        return tqdm(total=total, desc=f"  {what}", unit="sample", disable=not self.progress, leave=False)


def _kept(indices: list[int], logits: Tensor, labels: Tensor) -> list[int]:
    right = (logits.argmax(-1) == labels).tolist()
    return [index for index, ok in zip(indices, right, strict=True) if ok]
