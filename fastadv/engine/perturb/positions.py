"""Scopes "batch", "sample" and "token": one vector per position. In packed rows a sample is a document."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.lookup import Lookup
from fastadv.engine.perturb.perturbation import Move, Perturbation, fill, group_norms, mean_norm
from fastadv.engine.perturb.rule import Rule
from fastadv.engine.perturb.start import Draw
from fastadv.ops import ascend


class PositionPerturbation(Perturbation):
    """Each lookup has a perturbation and a ball of its own."""

    def start(self, draw: Draw, seed: int, lookup: Lookup) -> None:
        """Draw delta for every position."""
        index = next(i for i, other in enumerate(self.lookups) if other is lookup)
        fill(lookup.delta, draw, seed + index, lookup.mask, index, lookup.documents)

    def ascend(self, rule: Rule) -> None:
        """Each lookup by itself; of a plain one, the next embedding is written in the same pass over memory."""
        for lookup in self.lookups:
            if lookup.grad is None:
                continue
            written = lookup.next_lookup()
            ascend(
                lookup.delta,
                lookup.grad,
                mask=lookup.mask,
                skipped=self.buffers.skipped_on(lookup.grad.device),
                group=self._group(lookup.delta, rule),
                starts=self._starts(lookup, rule),
                fused=self.fused,
                **rule._asdict(),
                **written,
            )
            lookup.wrote(written)
            lookup.grad = None

    @torch.no_grad()
    def move(self, step: Move) -> None:
        """Each lookup by itself."""
        for index, lookup in enumerate(self.lookups):
            if lookup.grad is not None:
                grad = lookup.grad.to(lookup.delta.dtype)
                moved = step(index, lookup.delta.detach(), _masked(grad, lookup.mask))
                lookup.delta.copy_(_masked(moved, lookup.mask))
                lookup.grad = lookup.ready = None

    def _group(self, delta: Tensor, rule: Rule) -> int:
        if rule.by_element:
            return 1  # a sample with a non-finite gradient stands or falls by itself
        return {"batch": 0, "sample": 1, "token": delta.ndim - 1}[self.scope]

    def _starts(self, lookup: Lookup, rule: Rule) -> Tensor | None:
        """Where documents begin, if they are the groups."""
        by_sample = rule.by_element or self.scope == "sample"
        return lookup.documents.starts if by_sample and lookup.documents is not None else None

    def norm(self, kind: str) -> Tensor:
        """Over the groups of all lookups."""
        leading = {"batch": 0, "sample": 1, "token": -1}[self.scope]
        return mean_norm(
            [
                group_norms(lookup.delta.detach(), leading, kind, lookup.documents if leading == 1 else None)
                for lookup in self.lookups
            ]
        )


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)
