"""How SMART, VAT and the Bregman proximal point compare two answers of a model to the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fastadv.engine.outputs import logits_of
from fastadv.engine.step import Step
from fastadv.methods.options import one_of
from fastadv.native.divergence import KINDS
from fastadv.ops import divergence as op

Divergence = Literal["symmetric_kl", "kl", "js", "mse"] | Callable[[Tensor, Tensor], Tensor]


class Comparison:
    """D(logits, target), averaged over samples, or over the tokens of a batch that are not padding.

    Args:
        kind: "symmetric_kl", "kl", "js", "mse", or a callable `(logits, target) -> 0-d tensor`.
        who: the method, for its error messages.
        option: the name of the argument that `kind` was given as.

    Raises:
        ValueError: a name that is none of these.
    """

    def __init__(self, kind: Divergence, who: str, option: str = "divergence") -> None:
        if not callable(kind):
            one_of(option, kind, KINDS)
        self.kind = kind
        self.who = who

    def logits(self, output: Any) -> Tensor:
        """The logits to compare, in the closure's result: [..., C].

        Raises:
            TypeError: there are no logits.
            ValueError: there is only one class, and the divergence is one of distributions.
        """
        logits = logits_of(output, self.who)
        if self.kind == "mse":
            return logits.unsqueeze(-1) if logits.dim() == 1 else logits
        if not callable(self.kind) and (logits.dim() == 1 or logits.shape[-1] == 1):
            raise ValueError(
                f"{self.who} compares distributions over classes, and logits of shape {tuple(logits.shape)} have one "
                "class, of probability one: for regression use divergence='mse'"
            )
        return logits

    def __call__(self, logits: Tensor, target: Tensor, step: Step, weight: float = 1.0) -> Tensor:
        """Weight * D: 0-d, in float32 (float64 for float64)."""
        if callable(self.kind):
            return weight * self.kind(logits, target)
        wide = torch.promote_types(logits.dtype, torch.float32)
        mask = step.lookups.mask_of(logits.shape[:-1])
        if mask is None:
            count = max(logits[..., 0].numel(), 1)
            weights = torch.full(logits.shape[:-1], weight / count, dtype=wide, device=logits.device)
        else:
            weights = mask.to(wide)
            weights = weights * (weight / weights.sum().clamp(min=1))
        return op(logits, target, self.kind, weights=weights, fused=step.lookups.places.fused)
