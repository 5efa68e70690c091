"""What a model gives the target tokens of a batch: the losses are formulas on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.llm.head import target_logits
from fastadv.llm.targets import Targets


class Scores:
    """The logits [N, V] that predict the N target tokens of a batch, and what follows of them.

    All is computed in float32, or float64 for float64 logits, whatever the model's dtype.

    Args:
        logits: [N, V], any floating dtype.
        targets: the N tokens.

    Raises:
        ValueError: the shapes do not fit.

    Examples:
        >>> logits = torch.zeros(2, 4)
        >>> scores = Scores(logits, Targets.of(torch.tensor([[-100, 1, 2]])))
        >>> scores.log_probs
        tensor([-1.3863, -1.3863])
        >>> scores.totals(), scores.means()
        (tensor([-2.7726]), tensor([-1.3863]))
    """

    def __init__(self, logits: Tensor, targets: Targets) -> None:
        if logits.dim() != 2 or len(logits) != len(targets.ids):
            raise ValueError(f"logits must be [{len(targets.ids)}, V], one row per target, not {tuple(logits.shape)}")
        self.logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        self.targets = targets

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, *, shift: bool = True) -> Scores:
        """Read full logits [B, T, V] and labels [B, T]; `shift=False` where the labels are shifted already.

        Examples:
            >>> Scores.of(torch.zeros(1, 2, 4), torch.tensor([[3, -100]]), shift=False).log_probs
            tensor([-1.3863])
        """
        targets = Targets.of(labels, shift=shift)
        if logits.shape[:-1] != targets.shape:
            raise ValueError(f"logits must be [B, T, V] with [B, T] = {targets.shape}, not {tuple(logits.shape)}")
        return cls(logits.flatten(0, 1).index_select(0, targets.place), targets)

    @property
    def log_probs(self) -> Tensor:
        """Log p of each target, [N]."""
        return -F.cross_entropy(self.logits, self.targets.ids, reduction="none")

    @property
    def log_odds(self) -> Tensor:
        """Log p - log(1 - p) of each target, [N]: its logit less the logsumexp of the others.

        1 - p is never formed, so that neither p near 1 nor p near 0 loses digits, and no gradient by a logit exceeds 1.
        """
        ids = self.targets.ids.unsqueeze(1)
        others = self.logits.scatter(1, ids, -torch.inf)
        return self.logits.gather(1, ids).squeeze(1) - others.logsumexp(dim=1)

    def totals(self) -> Tensor:
        """The log-probability of each sample's targets, their sum: [B]."""
        return self._whole().per_sample(self.log_probs)

    def means(self) -> Tensor:
        """The same by token: [B]."""
        totals = self.totals()
        return totals / self.targets.counts(totals)

    def _whole(self) -> Targets:
        if not self.targets.filled:
            raise ValueError("a sample has no target, and so no log-probability: leave it out of the batch")
        return self.targets


def score(model: nn.Module, *, labels: Tensor | Targets, **inputs: Any) -> Scores:
    """Run the model on a batch, and keep what it gives the target tokens.

    The head runs at the positions that predict a target, and nowhere else: N x V logits instead of B x T x V. Losses
    and gradients are those of the full logits. Where the head cannot be found, is compiled, or sees a shard of the
    sequence, the full logits are computed and cut.

    The model's own forward runs, so that perturbations, PEFT, DDP and FSDP act as in any call of the model.

    Args:
        model: a causal language model of transformers, wrapped or not, or a module with an `lm_head` that returns
            logits [B, T, V].
        labels: [B, T] integers, -100 where there is no target, unshifted; or the `Targets` made of them.
        **inputs: what the model takes besides: `input_ids` or `inputs_embeds`, `attention_mask`, ...

    Raises:
        TypeError, ValueError: labels that hold no target or do not fit; a model that returns no logits.

    Examples:
        >>> class Bigram(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.embed, self.lm_head = nn.Embedding(5, 3), nn.Linear(3, 5)
        ...
        ...     def forward(self, input_ids):
        ...         return self.lm_head(self.embed(input_ids))
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> score(Bigram(), input_ids=ids, labels=ids.where(ids > 2, -100)).logits.shape
        torch.Size([2, 5])
    """
    targets = labels if isinstance(labels, Targets) else Targets.of(labels)
    return Scores(target_logits(model, targets, inputs), targets)
