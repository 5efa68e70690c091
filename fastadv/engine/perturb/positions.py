"""Scopes "batch", "sample" and "token": one vector per position. In packed rows a sample is a document."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.lookup import Lookup
from fastadv.engine.perturb import across
from fastadv.engine.perturb.clamp import DIVIDED_RANGE, into_range
from fastadv.engine.perturb.perturbation import DIVIDED, Move, Perturbation, fill, group_norms, mean_norm
from fastadv.engine.perturb.ranks import Meeting
from fastadv.engine.perturb.rule import Rule
from fastadv.engine.perturb.start import Draw

APART = 0x9E3779B1  # between the seeds of two ranks: odd, and far, since a generator may take the lower 32 bits alone


class PositionPerturbation(Perturbation):
    """Each lookup has a perturbation and a ball of its own."""

    _divided = False  # each sample, over ranks
    _by_sample = False  # it starts where whole samples say
    _moved = False  # so that there is a norm to tell the other ranks
    _over_ranks: dict[str, Tensor] | None = None  # the norms that all ranks know, by kind

    def divide(self, *, has_ids: bool) -> None:  # noqa: ARG002
        """What takes more than a position is then asked of the other ranks, or refused."""
        if self.lookups.places.clamps:
            raise ValueError(DIVIDED_RANGE)
        self._divided = True
        self._check(self._by_sample)

    def _check(self, whole: bool) -> None:
        if whole and self._divided and self.meeting is None:
            raise ValueError(DIVIDED)

    def settle(self) -> None:
        """Take the norms now, while the other ranks do so too."""
        if self.meeting is not None and self._moved:
            self._over_ranks = across.norms(
                [lookup.delta.detach() for lookup in self.lookups], self.scope, self.meeting
            )

    def start(self, draw: Draw, seed: int, lookup: Lookup) -> None:
        """Draw delta for every position."""
        self._by_sample = draw.by_sample
        self._check(draw.by_sample)
        index = next(i for i, other in enumerate(self.lookups) if other is lookup)
        part = 0 if self.meeting is None else self.meeting.ranks.rank * APART  # parts of a sample do not draw alike
        fill(lookup.delta, draw.of(lookup.module), seed + index + part, lookup.mask, index, lookup.documents)
        self._moved = True

    def ascend(self, rule: Rule) -> None:
        """Each lookup by itself; of a plain one, the next embedding is written in the same pass over memory."""
        self._check(self.scope != "token" and not rule.by_element)
        self._moved = True
        self.ascents += 1
        if self.meeting is not None and across.joins(self.scope, rule):
            self._over(self.meeting, rule)
            for lookup in self.lookups:
                lookup.grad = lookup.ready = None
            return
        clamps = self.lookups.places.clamps
        for lookup in self.lookups:
            moments = self._moments(lookup, rule)
            if lookup.grad is None:
                continue
            written, own = {} if clamps else lookup.next_lookup(), rule.of(lookup.module)
            self.stepping(moments)(
                lookup.delta,
                lookup.grad,
                mask=lookup.mask,
                skipped=self.buffers.skipped_on(lookup.grad.device),
                group=self._group(lookup.delta, own),
                starts=self._starts(lookup, own),
                fused=self.fused,
                **own._asdict(),
                **written,
            )
            lookup.wrote(written)
            lookup.grad = None
            if clamps:
                into_range(lookup, self.lookups.places.modules[lookup.module])

    def _over(self, meeting: Meeting, rule: Rule) -> None:
        """The same where other ranks have parts of the groups."""
        items, skipped = self.lookups.items, self.buffers.skipped_on(self.lookups.items[0].delta.device)
        if not rule.moments:
            across.ascend(items, self.scope, rule, meeting, skipped)
            return
        void = torch.zeros_like(skipped)
        group = 0 if self.scope == "batch" else 1

        def step(lookup: Lookup, grad: Tensor) -> None:
            stepped = self.stepping(self._moments(lookup, rule))
            free = rule.of(lookup.module)._replace(epsilon=None, ball="none")._asdict()
            stepped(lookup.delta, grad, skipped=void, group=group, fused=self.fused, **free)

        across.by_moments(items, self.scope, rule, meeting, skipped, step)

    def _moments(self, lookup: Lookup, rule: Rule) -> Tensor | None:
        """What the last ascent left; zeros in a search's first."""
        if not rule.moments:
            return None
        shape = (rule.moments, *lookup.delta.shape)
        if lookup.moments is None or lookup.moments.shape != shape:
            lookup.moments = lookup.delta.new_zeros(shape)
        elif self.ascents == 1:
            lookup.moments.zero_()
        return lookup.moments

    @torch.no_grad()
    def move(self, step: Move) -> None:
        """Each lookup by itself."""
        self._moved = True
        for index, lookup in enumerate(self.lookups):
            if lookup.grad is not None:
                grad = lookup.grad.to(lookup.delta.dtype)
                moved = step(index, lookup.delta.detach(), _masked(grad, lookup.mask))
                lookup.delta.copy_(_masked(moved, lookup.mask))
                lookup.grad = lookup.ready = None
                if self.lookups.places.clamps:
                    into_range(lookup, self.lookups.places.modules[lookup.module])

    def _group(self, delta: Tensor, rule: Rule) -> int:
        if rule.by_element:
            return 1  # a sample with a non-finite gradient stands or falls by itself
        return {"batch": 0, "sample": 1, "token": delta.ndim - 1}[self.scope]

    def _starts(self, lookup: Lookup, rule: Rule) -> Tensor | None:
        """Where documents begin, if they are the groups."""
        by_sample = rule.by_element or self.scope == "sample"
        return lookup.documents.starts if by_sample and lookup.documents is not None else None

    def norm(self, kind: str, site: int | None = None) -> Tensor:
        """Over the groups of all lookups, and of all ranks; of one site, those of this rank."""
        if self._over_ranks is not None and site is None:
            return mean_norm([self._over_ranks[kind]])
        leading = {"batch": 0, "sample": 1, "token": -1}[self.scope]
        return mean_norm(
            [
                group_norms(lookup.delta.detach(), leading, kind, lookup.documents if leading == 1 else None)
                for lookup in self.lookups
                if site is None or lookup.module == site
            ]
        )


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)
