r"""An ascent whose norms are over the parts of several ranks: one exchange of five numbers per norm.

.. math:: \delta_r \leftarrow \Pi\Big(\delta_r + \text{step} \cdot \frac{h_r}{N}\Big), \qquad
    \lVert \delta + \tfrac{\text{step}}{N} h \rVert^2 = \lVert \delta \rVert^2
    + 2 \tfrac{\text{step}}{N} \langle \delta, h \rangle + \tfrac{\text{step}^2}{N^2} \lVert h \rVert^2

h is the gradient, or its sign; N its norm over all ranks (1 for the sign). What the projection needs of the moved
perturbation follows from what is known before it moves, so that nothing is sent twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.engine.lookup import Lookup
from fastadv.engine.perturb.ranks import Meeting
from fastadv.engine.perturb.rule import Rule
from fastadv.ops.ascend import l2_norm, largest


def joins(scope: str, rule: Rule) -> bool:
    """Whether an ascent asks the other ranks: a token is whole on its own, but its sample may be void elsewhere."""
    return scope != "token" or rule.by_element


@torch.no_grad()
def ascend(lookups: Sequence[Lookup], scope: str, rule: Rule, meeting: Meeting, skipped: Tensor) -> None:
    """One step of all lookups, in place. A group that is not finite anywhere stays everywhere, and is counted once."""
    leading = 0 if scope == "batch" else 1
    parts = [_Part.of(lookup, leading, rule.of(lookup.module)) for lookup in lookups]
    every = meeting.gather(torch.cat([part.figures() for part in parts]))
    figures_of = torch.split(every, [len(part.h) for part in parts], dim=1)
    for lookup, part, figures in zip(lookups, parts, figures_of, strict=True):
        own = rule.of(lookup.module)
        whole = _Whole.of(figures, own)
        skipped += (~whole.finite).sum()
        lookup.delta.copy_(_moved(part, whole, own).view(lookup.delta.shape))


@torch.no_grad()
def by_moments(
    lookups: Sequence[Lookup],
    scope: str,
    rule: Rule,
    meeting: Meeting,
    skipped: Tensor,
    step: Callable[[Lookup, Tensor], None],
) -> None:
    """The same for a rule with moments, whose `step` needs no other rank: what is void is asked before, norms after."""
    leading = 0 if scope == "batch" else 1
    parts = [_Part.of(lookup, leading, rule.of(lookup.module)) for lookup in lookups]
    finite = meeting.gather(torch.cat([part.finite.double() for part in parts])).amin(0).bool()
    sizes = [len(part.h) for part in parts]
    for lookup, part, good in zip(lookups, parts, torch.split(finite, sizes), strict=True):
        skipped += (~good).sum()
        step(lookup, torch.where(good, part.h, math.nan).view(lookup.delta.shape).to(lookup.delta.dtype))
    if rule.ball == "none" or all(rule.of(lookup.module).epsilon is None for lookup in lookups):
        return
    moved = [_by_group(lookup.delta.detach(), leading) for lookup in lookups]
    norms = meeting.gather(torch.cat([_both(one) for one in moved]))[..., 0].t()
    for lookup, one, parts_of in zip(lookups, moved, torch.split(norms, sizes), strict=True):
        size, delta, radius = l2_norm(parts_of), lookup.delta, rule.of(lookup.module).epsilon
        if radius is None:
            continue
        on_ball = (
            one.clamp(-radius, radius)
            if rule.ball == "linf"
            else torch.where(size > radius, one * (radius / size), one)
        )
        delta.copy_(on_ball.view(delta.shape))


class _Part(NamedTuple):
    """One lookup's part of each group, [G, n], in float64."""

    delta: Tensor
    h: Tensor  # zero in a group that is not finite here
    finite: Tensor  # [G, 1]

    @staticmethod
    def of(lookup: Lookup, leading: int, rule: Rule) -> _Part:
        delta = lookup.delta.detach()
        grad = torch.zeros_like(delta) if lookup.grad is None else lookup.grad
        if lookup.mask is not None:
            grad = grad.masked_fill(~lookup.mask.unsqueeze(-1), 0)
        h = _by_group(grad, leading)
        finite = h.isfinite().all(dim=1, keepdim=True)
        h = torch.where(finite, h, 0)
        return _Part(_by_group(delta, leading), h.sign() if rule.direction == "sign" else h, finite)

    def figures(self) -> Tensor:
        """[G, 5]: what a whole is made of."""
        delta, h, finite = self
        if h.shape[1] == 0:
            return torch.cat([finite.double(), h.new_zeros(len(h), 4)], dim=1)
        size = l2_norm(h)
        along = (delta * (h / torch.where(size > 0, size, 1))).sum(dim=1, keepdim=True)
        return torch.cat([finite.double(), size, largest(h), along, l2_norm(delta)], dim=1)


class _Whole(NamedTuple):
    """The parts of all ranks together, [G, 1]."""

    finite: Tensor
    divisor: Tensor  # N; 1 where there is nothing to divide
    length: Tensor  # of the step, in the l2 norm
    norm: Tensor  # of delta after the step

    @staticmethod
    def of(figures: Tensor, rule: Rule) -> _Whole:
        """Of the ranks' figures, [ranks, G, 5]."""
        finite = figures[..., 0].amin(0).bool()[:, None]
        sizes, most, along = figures[..., 1].t(), figures[..., 2].amax(0)[:, None], figures[..., 3].t()
        size, before = l2_norm(sizes), l2_norm(figures[..., 4].t())
        divisor = {"sign": torch.ones_like(size), "l2": size, "max": most}[rule.direction]
        divisor = torch.where(divisor > 0, divisor, 1)
        slope = (along * (sizes / torch.where(size > 0, size, 1))).sum(dim=1, keepdim=True)
        length = torch.where(finite, rule.step_size * (size / divisor), 0)
        norm = (before.square() + 2 * length * slope + length.square()).clamp(min=0).sqrt()
        return _Whole(finite, divisor, length, norm)


def _moved(part: _Part, whole: _Whole, rule: Rule) -> Tensor:
    moved = part.delta + torch.where(whole.finite, rule.step_size * (part.h / whole.divisor), 0)
    if rule.epsilon is None or rule.ball == "none":
        return moved
    if rule.ball == "linf":
        return moved.clamp(-rule.epsilon, rule.epsilon)
    return torch.where(whole.norm > rule.epsilon, moved * (rule.epsilon / whole.norm), moved)


@torch.no_grad()
def norms(deltas: Sequence[Tensor], scope: str, meeting: Meeting) -> dict[str, Tensor]:
    """By kind of norm, that of each group over all ranks, [G]; in token scope of every rank's tokens, their mean."""
    leading = {"batch": 0, "sample": 1, "token": -1}[scope]
    groups = [_by_group(delta, delta.ndim - 1 if leading < 0 else leading) for delta in deltas]
    own = torch.cat([_both(group) for group in groups])
    if scope == "token":
        sums = torch.stack([own.sum(0), (own > 0).sum(0).to(own)])
        total, count = meeting.gather(sums).sum(0)
        means = total / count.clamp(min=1)
        return {"l2": means[:1], "linf": means[1:]}
    every = meeting.gather(own)
    return {"l2": l2_norm(every[..., 0].t()).flatten(), "linf": every[..., 1].amax(0)}


def _both(group: Tensor) -> Tensor:
    """[G, 2]: the l2 norm and the largest magnitude of each row."""
    if group.shape[1] == 0:
        return group.new_zeros(len(group), 2)
    return torch.cat([l2_norm(group), largest(group)], dim=1)


def _by_group(x: Tensor, leading: int) -> Tensor:
    """[G, n] in float64; a rank's part of a group may be empty."""
    count = math.prod(x.shape[:leading])
    return x.double().reshape(count, x.numel() // max(count, 1))
