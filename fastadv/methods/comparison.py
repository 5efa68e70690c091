"""How SMART, VAT and the Bregman proximal point compare two answers of a model to the same batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastadv.engine.model.find import unwrap
from fastadv.engine.outputs import logits_of
from fastadv.engine.step import Step
from fastadv.methods.options import one_of
from fastadv.native.divergence import KINDS
from fastadv.ops import divergence as op
from fastadv.ops.divergence import BERNOULLI

Divergence = (
    Literal["symmetric_kl", "kl", "js", "mse", "bernoulli", "symmetric_bernoulli"] | Callable[[Tensor, Tensor], Tensor]
)

OF_LABELS = {of_classes: of_labels for of_labels, of_classes in BERNOULLI.items()}
SINGLE = (*BERNOULLI, "mse")  # kinds that one column of logits is enough for


class Comparison:
    """D(logits, target), averaged over samples, or over the tokens of a batch that are not padding.

    Args:
        kind: "symmetric_kl", "kl", "js", "mse", "bernoulli", "symmetric_bernoulli", or a callable `(logits, target) ->
            0-d tensor`; None: by the problem that the model's config names.
        who: the method, for its error messages.
        model: whose config tells the problem.
        default: "kl" or "symmetric_kl", of classes.
        option: the name of the argument that `kind` was given as.

    Raises:
        ValueError: a name that is none of these.
    """

    def __init__(
        self,
        kind: Divergence | None,
        who: str,
        model: nn.Module,
        default: Literal["kl", "symmetric_kl"] = "symmetric_kl",
        option: str = "divergence",
    ) -> None:
        if kind is not None and not callable(kind):
            one_of(option, kind, (*KINDS, *BERNOULLI))
        self._kind = kind
        self._model = model
        self._default = default
        self.who = who

    @property
    def kind(self) -> Divergence:
        """What is computed. transformers may name a model's problem only when it sees the first labels."""
        return by_problem(self._model, self._default) if self._kind is None else self._kind

    def logits(self, output: Any) -> Tensor:
        """The logits to compare, in the closure's result: [..., C].

        Raises:
            TypeError: there are no logits.
            ValueError: there is only one class, and the divergence is one of distributions.
        """
        logits = logits_of(output, self.who)
        if self.kind in SINGLE:
            return logits.unsqueeze(-1) if logits.dim() == 1 else logits
        if not callable(self.kind) and (logits.dim() == 1 or logits.shape[-1] == 1):
            raise ValueError(
                f"{self.who} compares distributions over classes, and logits of shape {tuple(logits.shape)} have one "
                "class, of probability one: for regression use divergence='mse', for a single yes or no 'bernoulli'"
            )
        return logits

    def __call__(self, logits: Tensor, target: Tensor, step: Step, weight: float | Tensor = 1.0) -> Tensor:
        """Weight * D: 0-d, in float32 (float64 for float64)."""
        kind = self.kind
        if callable(kind):
            return weight * kind(logits, target)
        wide = torch.promote_types(logits.dtype, torch.float32)
        mask = step.lookups.mask_of(logits.shape[:-1])
        if mask is None:
            count = max(logits[..., 0].numel(), 1)
            weights = torch.ones(logits.shape[:-1], dtype=wide, device=logits.device) * (weight / count)
        else:
            weights = mask.to(wide)
            weights = weights * (weight / weights.sum().clamp(min=1))
        return op(logits, target, kind, weights=weights, fused=step.lookups.places.fused)


def problem_of(model: nn.Module) -> str | None:
    """The problem that the config of the user's own model names (`problem_type`); None where it names none."""
    return getattr(getattr(unwrap(model), "config", None), "problem_type", None)


def by_problem(model: nn.Module, default: Literal["kl", "symmetric_kl"]) -> Divergence:
    """The divergence of a model's problem, as its config names it (`problem_type`); `default` where it names none.

    One label and no name is regression, as transformers takes it.
    """
    problem = problem_of(model)
    config = getattr(unwrap(model), "config", None)
    if problem == "multi_label_classification":
        return OF_LABELS[default]  # type: ignore[return-value]
    if problem == "regression" or (problem is None and getattr(config, "num_labels", None) == 1):
        return "mse"
    return default
