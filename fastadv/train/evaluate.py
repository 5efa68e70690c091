# mypy: disable-error-code="no-untyped-call"
"""Measure a model, clean and under an attack on its word embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
from transformers import DataCollatorWithPadding

from fastadv import PGD
from fastadv.train import metrics
from fastadv.train.labels import CLASSIFICATION, task_of
from fastadv.train.losses import losses
from fastadv.train.modeling_mean_pool import MeanPoolClassifier
from fastadv.train.tokens import Tokens

BATCH = 64


def measuring(model: MeanPoolClassifier, radius: float, steps: int) -> PGD:
    """Make the attack that models are measured by: from zero, in steps of a quarter of each sample's radius."""
    return PGD(model, epsilon=radius, step_size=radius / 4, steps=steps, norm="l2", scope="sample")


def summed(model: MeanPoolClassifier, batch: Mapping[str, Tensor]) -> Tensor:
    """Sum a batch's losses up, so that no sample's gradient shrinks with the batch."""
    loss: Tensor = model(**batch).loss
    return loss * len(batch["labels"])


class Evaluator:
    """Run one model over one data set, in batches of similar length."""

    def __init__(self, model: MeanPoolClassifier, data: Tokens, tokenizer: Any, progress: bool = True) -> None:
        self.model = model.eval()
        self.data = data
        self.task = task_of(model.config.problem_type)
        self.targets = torch.tensor([item["labels"] for item in data.items])
        self.collate: Any = DataCollatorWithPadding(tokenizer)
        self.device = next(model.parameters()).device
        self.progress = progress

    def measure(self, samples: int | None, radii: Sequence[float], steps: int) -> list[dict[str, Any]]:
        """Measure all samples without an attack, and the first `samples` (None: all) under PGD at each radius.

        A dict per radius, the one without an attack first: see `metrics.cell`.
        """
        outputs = self.clean()
        total = len(self.data) if samples is None else min(samples, len(self.data))
        clean = metrics.cell(self.task, 0.0, outputs, self.targets, self._right(outputs, self.targets))
        return [clean, *self.attacked(outputs[:total], radii, steps)]

    def clean(self) -> Tensor:
        """Compute the answers [N, C] to all samples, in their order."""
        with torch.inference_mode():
            found = self._answers(range(len(self.data)), "clean", self._logits)
        return found.clone()  # outside of inference mode, a tensor like any other

    def attacked(self, outputs: Tensor, radii: Sequence[float], steps: int) -> list[dict[str, Any]]:
        """Measure the first samples under PGD at each radius. `outputs`: the answers to them without an attack.

        The ball is each sample's: the l2 norm over its tokens. PGD starts at zero, and takes steps of radius / 4. What
        an attack of a smaller radius found lies inside the larger ball too, so the answer of the highest loss counts.
        A sample whose class is wrong already needs no attack: only the others are attacked.
        """
        answers, targets = outputs.clone(), self.targets[: len(outputs)]
        right = self._right(answers, targets)
        cells = []
        for radius in sorted(radii):
            chosen = right.nonzero()[:, 0] if self.task == CLASSIFICATION else torch.arange(len(targets))
            moved = self._under_attack(chosen.tolist(), radius, steps)
            right[chosen] &= self._right(moved, targets[chosen])
            answers[chosen] = self._worse(moved, answers[chosen], targets[chosen])
            cells.append(metrics.cell(self.task, radius, answers, targets, right))
        return cells

    def _right(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return metrics.right(self.task, outputs, targets)

    def _worse(self, moved: Tensor, before: Tensor, targets: Tensor) -> Tensor:
        """Keep of each sample's two answers the one of the higher loss; of classes, the one after the attack."""
        if self.task == CLASSIFICATION:
            return moved
        kind = self.model.config.problem_type
        (_, new), (_, old) = (losses(kind, one, targets) for one in (moved, before))
        return torch.where((new > old)[:, None], moved, before)

    def _under_attack(self, chosen: Sequence[int], radius: float, steps: int) -> Tensor:
        with measuring(self.model, radius, steps) as attack:
            return self._answers(chosen, f"PGD-{steps}, radius {radius:g}", lambda batch: self._attack(attack, batch))

    def _answers(self, chosen: Sequence[int], what: str, answer: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Put the answers to the batches back into the order of `chosen`."""
        rows: dict[int, Tensor] = {}
        with self._bar(what, len(chosen)) as bar:
            for indices, batch in self._batches(chosen):
                rows.update(zip(indices, answer(batch).float().cpu(), strict=True))
                bar.update(len(indices))
        width = self.model.config.num_labels
        return torch.stack([rows[index] for index in chosen]) if rows else torch.zeros(0, width)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(batch["input_ids"], batch["attention_mask"]).logits
        return logits

    def _attack(self, attack: PGD, batch: dict[str, Tensor]) -> Tensor:
        """Compute the logits at the perturbation that the attack finds."""
        with attack.perturbed(lambda: summed(self.model, batch), mask=batch["attention_mask"]), torch.no_grad():
            return self._logits(batch)

    def _batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        items = self.data.items
        order = sorted(indices, key=lambda index: len(items[index]["input_ids"]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            yield chosen, self.collate([dict(items[index]) for index in chosen]).to(self.device)

    def _bar(self, what: str, total: int) -> Any:
        return tqdm(total=total, desc=f"  {what}", unit="sample", disable=not self.progress, leave=False)
