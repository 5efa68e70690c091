r"""Where one perturbation lies in several texts: the n-th position that carries it has its sample's n-th vector.

.. math:: h_{b,t} \leftarrow h_{b,t} + \delta_{b,n(b,t)}, \qquad
    \frac{\partial L}{\partial \delta_{b,n}} = \sum_{\text{forwards}} \frac{\partial L}{\partial h_{b,t(b,n)}}

n counts the true positions of a sample's mask from the left, whatever the padding side and the length; t leads back.
Both are indices, so that a vector goes to one position of a forward, and its gradient comes from there: no sum of
colliding writes, and no order of atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from fastadv.engine.lookup import Lookup
from fastadv.engine.perturb.masks import MaskCheck

CONVENTION = "at(mask) takes [B, T], true or 1 where the forwards inside carry the perturbation"
OTHER_KIND = CONVENTION + ", not {got}"
OTHER_SAMPLES = CONVENTION + ". This mask has {now} samples, and the first of the step had {before}: give each a row"
OTHER_COUNT = (
    CONVENTION + ", as many of each sample in every forward of a step. Sample {sample} has {now} under this mask and "
    "{before} under the first"
)
OTHER_SHAPE = (
    "at(mask) has shape {mask}, but the perturbed module ({name}) returned {shape} inside: give the mask of that "
    "forward's own positions, [B, T], or leave forwards of other lengths out of the block"
)


KEPT = 8  # masks of a step whose indices are not computed again


class Where(NamedTuple):
    """The positions of one text that carry the perturbation, as indices both ways."""

    mask: Tensor  # [B, T] bool
    slot: Tensor  # [B, T] int64: which row of delta [B * N, D] a position takes; -1: none
    place: Tensor  # [B, N] int64: at which position vector n lies
    there: Tensor  # [B, N] bool: whether there is such a vector

    def of(self, lookup: Lookup, shape: Size, name: str, plain: bool) -> Lookup:
        """What moves one call of a site, whose perturbation is `lookup`'s: by the rows where it is a plain lookup.

        Raises:
            ValueError: the call has other positions than the mask.
        """
        if shape[:-1] != self.mask.shape:
            raise ValueError(OTHER_SHAPE.format(mask=tuple(self.mask.shape), name=name, shape=tuple(shape)))
        delta, (_, slot, place, there) = lookup.delta, self
        if slot.device != delta.device:  # layers on several devices
            slot, place, there = slot.to(delta.device), place.to(delta.device), there.to(delta.device)
        if not plain:
            return Lookup(_Spread.apply(delta, slot, place, there), None)  # type: ignore[no-untyped-call]
        leaf = _Standing.apply(delta, place, there, shape)  # type: ignore[no-untyped-call]
        return Lookup(leaf, None, materialised=False, rows=delta.detach().flatten(0, 1), slot=slot)


class Texts:
    """The texts that share a perturbation: how many positions of each sample carry it, in all of them alike.

    N is the largest number where the first mask lies on the CPU. Elsewhere that number would be waited for: N is then
    the length of the first mask.

    Attributes:
        there: [B, N] bool, which vectors there are.
    """

    def __init__(self, first: Tensor, device: torch.device, check: MaskCheck) -> None:
        self._check, self._device = check, device
        first = self._read(first)
        counts = first.sum(1)
        room = max(1, int(counts.max()) if first.is_cpu and len(first) else first.shape[1])
        self._counts = counts
        self.there = (torch.arange(room, device=first.device) < counts.unsqueeze(1)).to(device)
        self._seen: list[tuple[Tensor, int, Where]] = []

    def where(self, given: Tensor) -> Where:
        """The positions that a mask says.

        Raises:
            TypeError: it is no tensor.
            ValueError: it has another shape or other values, or another number of positions of a sample than the first
                (looked at on the CPU; elsewhere for the first mask of a dtype).
        """
        version = -1 if not isinstance(given, Tensor) or given.is_inference() else given._version
        for mask, known, where in self._seen:
            if mask is given and known == version >= 0:
                return where
        mask = self._read(given)
        self._compare(mask)
        where = self._placed(mask.to(self._device, non_blocking=True))
        self._seen = [*self._seen[1 - KEPT :], (given, version, where)]
        return where

    def _read(self, given: object) -> Tensor:
        if not isinstance(given, Tensor):
            raise TypeError(OTHER_KIND.format(got=type(given).__name__))
        if given.dim() != 2:
            raise ValueError(OTHER_KIND.format(got=f"a tensor of shape {tuple(given.shape)}"))
        self._check.values(given, may_be_empty=True)
        return given.bool()

    def _compare(self, mask: Tensor) -> None:
        if len(mask) != len(self._counts):
            raise ValueError(OTHER_SAMPLES.format(now=len(mask), before=len(self._counts)))
        if not self._check.reads("at", mask):
            return
        now, before = mask.sum(1).cpu(), self._counts.cpu()
        if not torch.equal(now, before):
            sample = int((now != before).nonzero()[0])
            raise ValueError(OTHER_COUNT.format(sample=sample, now=int(now[sample]), before=int(before[sample])))

    def _placed(self, mask: Tensor) -> Where:
        (samples, length), room = mask.shape, self.there.shape[1]
        index = mask.cumsum(1) - 1
        taken = mask & (index < room)
        first = torch.arange(0, samples * room, room, device=mask.device).unsqueeze(1)
        slot = torch.where(taken, first + index, -1)
        place = torch.zeros(samples, room + 1, dtype=torch.int64, device=mask.device)  # the last: what is in no place
        positions = torch.arange(length, device=mask.device).expand(samples, length)
        place.scatter_(1, torch.where(taken, index, room), positions)
        return Where(mask, slot, place[:, :room].contiguous(), self.there)


class _Spread(torch.autograd.Function):
    """delta [B, N, D] at its positions [B, T, D], zero elsewhere. Differentiable twice: the way back is made of ops."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, slot: Tensor, place: Tensor, there: Tensor) -> Tensor:
        ctx.save_for_backward(place, there)
        rows = F.embedding(slot.clamp(min=0), delta.flatten(0, 1))
        return rows.masked_fill_((slot < 0).unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _collected(grads[0], *ctx.saved_tensors), None, None, None


class _Standing(torch.autograd.Function):
    """A zero of the text's shape, without a body, whose gradient is that of delta: see `gather_perturb`'s leaf."""

    @staticmethod
    def forward(ctx: Any, delta: Tensor, place: Tensor, there: Tensor, shape: Size) -> Tensor:
        ctx.save_for_backward(place, there)
        return delta.new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _collected(grads[0], *ctx.saved_tensors), None, None, None


def _collected(grad: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """[B, N, D]: the gradient at each vector's position."""
    found = grad.gather(1, place.unsqueeze(-1).expand(*place.shape, grad.shape[-1]))
    return found.masked_fill(~there.unsqueeze(-1), 0)
