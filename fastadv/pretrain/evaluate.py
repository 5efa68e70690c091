"""Measure a language model on held-out documents: as they are, under an attack on its embeddings, and misspelt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]

from fastadv import PGD
from fastadv.pretrain.masking import IGNORED

BATCH = 16


class Document(NamedTuple):
    """Hold a document as the model reads it, cut to the length of a row.

    Attributes:
        ids: what the model is shown.
        labels: as transformers takes them: of a causal model the ids themselves, of a masked one the ids at the places
            that were masked; -100 elsewhere.
    """

    ids: Sequence[int]
    labels: Sequence[int]


Losses = list[float]  # of each document, the sum over its tokens
Rows = dict[str, Tensor]
Around = Callable[[Rows], AbstractContextManager[None]]  # what a forward of these rows runs in


class Evaluator:
    """Run one model over documents, a document a row, padded on the right.

    Args:
        model: any `AutoModelForCausalLM` or `AutoModelForMaskedLM`; it is put into evaluation.
        causal: whether a position predicts the next one, or itself.
        padding: the token that fills rows up.
        progress: whether to show bars.
    """

    def __init__(self, model: nn.Module, *, causal: bool, padding: int, progress: bool = False) -> None:
        self.model = model.eval()
        self.causal = causal
        self.padding = padding
        self.progress = progress
        self.device = next(model.parameters()).device

    def losses(self, documents: Sequence[Document], what: str = "as they are") -> Losses:
        """Compute each document's loss, summed over its tokens, in nats."""
        with torch.inference_mode():
            return self._measured(documents, what, lambda _: nullcontext())

    def attacked(
        self, documents: Sequence[Document], clean: Losses, radii: Sequence[float], steps: int
    ) -> list[Losses]:
        r"""Compute each document's loss under PGD at each radius, smallest first.

        .. math:: \ell_d(\rho) = \max_{\rho' \le \rho} \; \ell\big(x_d + r_{\rho'}\big), \qquad
            \lVert r_{\rho'} \rVert_2 \le \rho' \, \overline{\lVert e \rVert}

        The ball is each document's, over all of its tokens, in units of the mean norm of this model's own embedding
        rows: a model whose embeddings have grown is not attacked any less. PGD starts at zero and takes steps of a
        quarter of the radius. What a smaller radius found lies inside the larger ball, so the highest loss counts;
        `clean` is that of radius 0.
        """
        found, worst = [], clean
        for radius in radii:
            with self._attack(radius, steps) as attack:
                moved = self._measured(documents, f"PGD-{steps}, radius {radius:g}", partial(self._moved, attack))
            worst = list(map(max, moved, worst))
            found.append(worst)
        return found

    def _attack(self, radius: float, steps: int) -> PGD:
        return PGD(
            self.model,
            epsilon=radius,
            step_size=radius / 4,
            steps=steps,
            norm="l2",
            scope="sample",
            relative=True,
        )

    def _moved(self, attack: PGD, rows: Rows) -> AbstractContextManager[None]:
        """Let the model see rows at the perturbation that the attack finds. Their losses' sum is what it climbs."""
        return attack.perturbed(lambda: self._of_rows(rows).sum(), mask=rows["attention_mask"])

    def _measured(self, documents: Sequence[Document], what: str, around: Around) -> Losses:
        """Put the losses of the batches back into the order of the documents."""
        found: dict[int, float] = {}
        with tqdm(total=len(documents), desc=f"  {what}", unit="doc", disable=not self.progress, leave=False) as bar:
            for indices, rows in self._batches(documents):
                with around(rows), torch.no_grad():
                    found.update(zip(indices, self._of_rows(rows).tolist(), strict=True))
                bar.update(len(indices))
        return [found[index] for index in range(len(documents))]

    def _of_rows(self, rows: Rows) -> Tensor:
        """Compute the losses [B] of rows, each summed over its tokens."""
        logits = self.model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        labels = rows["labels"]
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return each.sum(dim=1)

    def _batches(self, documents: Sequence[Document]) -> Iterator[tuple[list[int], Rows]]:
        order = sorted(range(len(documents)), key=lambda index: len(documents[index].ids))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            ids = [torch.tensor(documents[index].ids) for index in chosen]
            labels = [torch.tensor(documents[index].labels) for index in chosen]
            rows = {
                "input_ids": _padded(ids, self.padding),
                "labels": _padded(labels, IGNORED),
                "attention_mask": _padded([torch.ones_like(one) for one in ids], 0),
            }
            yield chosen, {name: tensor.to(self.device) for name, tensor in rows.items()}


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
