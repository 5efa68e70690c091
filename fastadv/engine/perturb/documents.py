"""Documents that lie one after another in the rows of a batch: what is meant by a sample there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.arguments.runs import Runs
from fastadv.engine.perturb.masks import MaskCheck

CONVENTION = "groups is [B, T], the number of each position's document from 0 on, and -1 where there is none"
OTHER_KIND = CONVENTION + ", in an integer dtype, not {got}"
OTHER_VALUES = CONVENTION + ", and this one holds {value}"
NO_DOCUMENT = CONVENTION + ", and this one is -1 everywhere: leave out batches that hold nothing but padding"
COMES_BACK = (
    "a document lies in one piece: in groups, row {row} has {value} at position {place} again, where another document "
    "has begun since. Number documents as they follow one another in a row"
)

Groups = Tensor | Sequence[Tensor | None] | None


class Documents(NamedTuple):
    """Where the documents of one batch lie. Padding belongs to the document before it, the first also to the next."""

    runs: Runs  # of its positions, row after row
    inside: Tensor  # [B, T] bool: a document is there

    @staticmethod
    def read(groups: Tensor, check: MaskCheck) -> Documents:
        """The documents of the user's `groups`.

        Raises:
            TypeError: they are no integers.
            ValueError: a number below -1, no document at all, or one in several pieces. On a GPU, where reading waits,
                the first groups of a dtype alone are looked at.
        """
        if groups.is_floating_point() or groups.is_complex() or groups.dtype == torch.bool or groups.dim() == 0:
            raise TypeError(OTHER_KIND.format(got=f"{groups.dtype} {list(groups.shape)}"))
        ids = groups.long().reshape(math.prod(groups.shape[:-1]), groups.shape[-1])
        inside = ids >= 0
        before = _before(ids, inside)
        begins = inside & (ids != before)
        if check.reads("groups", groups):
            _check(ids, inside, before, begins)
        of = (begins.flatten().cumsum(0) - 1).clamp(min=0)
        count = int(of[-1]) + 1 if of.is_cpu and len(of) else len(of)  # elsewhere the number would be waited for
        starts = torch.searchsorted(of, torch.arange(count + 1, device=of.device))
        return Documents(Runs(starts, of), inside.view(groups.shape))


def _before(ids: Tensor, inside: Tensor) -> Tensor:
    """The document of the last position before each that has one; -1: there is none in its row."""
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(inside, place, -1).cummax(dim=1).values if ids.numel() else ids
    last = torch.cat([torch.full_like(ids[:, :1], -1), last[:, :-1]], dim=1)
    return torch.where(last < 0, -1, ids.gather(1, last.clamp(min=0)))


def _check(ids: Tensor, inside: Tensor, before: Tensor, begins: Tensor) -> None:
    least = int(ids.min())
    if least < -1:
        raise ValueError(OTHER_VALUES.format(value=least))
    if not bool(inside.any()):
        raise ValueError(NO_DOCUMENT)
    if not bool((begins & (ids < before)).any()):
        return  # they rise in every row
    for row, (mine, starts) in enumerate(zip(ids, begins, strict=True)):
        seen: set[int] = set()
        for place in starts.nonzero().flatten().tolist():
            value = int(mine[place])
            if value in seen:
                raise ValueError(COMES_BACK.format(row=row, value=value, place=place))
            seen.add(value)
