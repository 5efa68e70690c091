"""Where a perturbation starts: zero, a random draw, or what the user's callable says."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from fastadv.arguments.runs import Runs
from fastadv.ops.ascend import l2_norm

Start = Callable[[tuple[int, ...], Tensor], Tensor]  # the user's: shape and mask of one call of the embedding
RandomStart = bool | float | Start
Total = Callable[[Tensor], Tensor]  # over the parts of a sample that several ranks hold
Drawn = Callable[[tuple[int, ...], Tensor, Runs | None], Tensor]  # ours: the documents of packed rows besides


class Source(Protocol):
    """Where random numbers of starts come from, by shape [rows, ...]."""

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """U(0, 1)."""

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """N(0, 1)."""


class _Generators:
    """torch's own generators, which `fill` has seeded for this start."""

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.rand(shape, device=device)

    def normal(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        return torch.randn(shape, device=device)


_source: Source = _Generators()


@contextlib.contextmanager
def drawing_from(source: Source) -> Iterator[None]:
    """Inside, starts are drawn from `source`: so that a row's numbers need not depend on its batch or process."""
    global _source  # noqa: PLW0603
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before


@dataclass(frozen=True)
class Draw:
    """The engine's: a start by shape, mask, which call it is, and documents. What is not `random` moves no generator.

    Attributes:
        by_sample: its size depends on all of a sample, and not on an element alone.
        each: of each perturbed place, where they differ.
    """

    at: Callable[[tuple[int, ...], Tensor, int, Runs | None], Tensor]
    random: bool = True
    by_sample: bool = False
    each: Sequence[Draw] = ()

    def of(self, site: int) -> Draw:
        """That of one of the perturbed places."""
        return self.each[site] if self.each else self

    @staticmethod
    def by_site(each: Sequence[Draw | None]) -> Draw | None:
        """Of each place its own; None: at zero, everywhere or there."""
        some = next((draw for draw in each if draw is not None), None)
        if some is None or len(each) == 1:
            return some
        return replace(some, each=[NOTHING if draw is None else draw for draw in each])


NOTHING = Draw(lambda shape, mask, *_: torch.zeros(shape, device=mask.device), random=False)


def resolve(
    random_start: RandomStart, epsilon: float | None, drawn: Callable[[float], Drawn], *, by_sample: bool = False
) -> Draw | None:
    """The start, of which `drawn` makes a magnitude; None for zero.

    Raises:
        ValueError: `True` with no epsilon to take the magnitude from, or a magnitude that is negative or not finite.
        TypeError: anything else than a bool, a number or a callable.
    """
    if callable(random_start):
        start = random_start
        return Draw(lambda shape, mask, *_: start(shape, mask))
    if not isinstance(random_start, (bool, int, float)):
        raise TypeError(f"random_start takes True, False, a magnitude or a callable, not {random_start!r}")
    if random_start is True:
        if epsilon is None:
            raise ValueError("random_start=True takes its magnitude from epsilon, which is None: give a magnitude")
        random_start = epsilon
    if not (math.isfinite(random_start) and random_start >= 0):
        raise ValueError(f"random_start must be a finite magnitude of at least 0, not {random_start}")
    if random_start == 0:
        return None
    draw = drawn(random_start)
    return Draw(lambda shape, mask, _, documents: draw(shape, mask, documents), by_sample=by_sample)


def uniform(norm: str, total: Total | None = None) -> Callable[[float], Drawn]:
    """What most methods draw of a magnitude."""
    return (lambda magnitude: uniform_l2(magnitude, total)) if norm == "l2" else uniform_linf


def uniform_l2(magnitude: float, total: Total | None = None) -> Drawn:
    """U(-1, 1) * magnitude / sqrt(length * D), with each sample's true length (FreeLB, Zhu et al. 2020)."""

    def draw(shape: tuple[int, ...], mask: Tensor, documents: Runs | None) -> Tensor:
        length = _lengths(mask, documents)
        length = (length if total is None else total(length)).clamp(min=1)
        return _uniform(shape, mask) * (magnitude / (length * shape[-1]).sqrt()).unsqueeze(-1)

    return draw


def uniform_linf(magnitude: float) -> Drawn:
    """U(-magnitude, magnitude) per element."""

    def draw(shape: tuple[int, ...], mask: Tensor, _: Runs | None) -> Tensor:
        return magnitude * _uniform(shape, mask)

    return draw


def normal(deviation: float) -> Drawn:
    """N(0, deviation^2) per element (SMART, Jiang et al. 2020)."""
    return lambda shape, mask, _: deviation * _source.normal(shape, mask.device)


def somewhere_at(radius: float, leading: int, total: Total | None = None) -> Drawn:
    """In a direction that is uniform over the sphere, at that l2 distance (VAT, Miyato et al. 2019).

    The first `leading` dimensions index the spheres; -1: all but the last. Where that is samples, documents do.
    """

    def draw(shape: tuple[int, ...], mask: Tensor, documents: Runs | None) -> Tensor:
        drawn = _source.normal(shape, mask.device).masked_fill_(~mask.unsqueeze(-1), 0)
        if leading == 1 and documents is not None:
            norm = l2_norm(drawn.reshape(-1, shape[-1]), documents).view(*shape[:-1], 1)
        else:
            norm = torch.linalg.vector_norm(drawn, dim=tuple(range(len(shape)))[leading:], keepdim=True)
        norm = norm if total is None else total(norm.square()).sqrt()
        start: Tensor = radius * drawn / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return start

    return draw


def _lengths(mask: Tensor, documents: Runs | None) -> Tensor:
    """How many positions each position's sample has."""
    if documents is not None:
        return documents.spread(mask.double().flatten(), "sum").long().view(mask.shape)
    within_sample = tuple(range(1, mask.ndim)) or 0  # a table's rows [R] are one sample
    return mask.sum(dim=within_sample, keepdim=True)


def _uniform(shape: tuple[int, ...], mask: Tensor) -> Tensor:
    return 2 * _source.uniform(shape, mask.device) - 1
