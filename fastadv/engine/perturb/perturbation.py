"""What the scopes share: where gradients come from, and what an ascent does with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fastadv.arguments.runs import Runs
from fastadv.engine.buffers import Buffers
from fastadv.engine.lookup import Lookup
from fastadv.engine.lookups import Lookups
from fastadv.engine.perturb.ranks import Meeting
from fastadv.engine.perturb.rule import Rule
from fastadv.engine.perturb.start import Draw
from fastadv.engine.safety.rng import apart
from fastadv.ops import ascend, moment_step
from fastadv.ops.ascend import l2_norm, largest

Move = Callable[[int, Tensor, Tensor], Tensor]  # a lookup's index, its delta and gradient -> its next delta

NO_IDS = (
    "the perturbed module's output is sharded over the sequence, so that scope='table' and 'row' do not see all of a "
    "word's positions: use scope='sample' with process_group= (the group of the shards), or scope='token'"
)
DIVIDED = (
    "the perturbed module's output is sharded over the sequence, and this method takes norms (or lengths) of whole "
    "samples: give process_group=, the group whose ranks have the shards (mesh['tp'].get_group()), or use scope='token'"
)


class Perturbation:
    """One step's. `lookups` carry its gradient, and what their modules' outputs are moved by.

    Attributes:
        meeting: of the ranks that each hold a part of what a norm is over; None: this one holds all of it.
        ascents: of this search so far; moments begin at zero with the first.
    """

    meeting: Meeting | None = None
    ascents = 0  # of this search

    def __init__(self, lookups: Lookups, scope: str, buffers: Buffers) -> None:
        self.lookups = lookups
        self.scope = scope
        self.buffers = buffers
        self.fused = lookups.places.fused

    def divide(self, *, has_ids: bool) -> None:
        """What is perturbed is a part of each sample; `has_ids`: the ids that are known are those of that part.

        Raises:
            ValueError: it has no ids, and words are perturbed.
        """
        raise NotImplementedError

    def settle(self) -> None:
        """At the end of a step: what has moved in place is put back, and measured before."""

    def put_back(self) -> None:
        """After a step that failed: what has moved in place is put back."""

    def zero_(self) -> None:
        """Back to no perturbation; a gradient stays."""
        for lookup in self.lookups:
            lookup.zero_()

    def begin(self) -> None:
        """A search begins: gradient, moments and embeddings of an earlier one are not its own."""
        self.ascents = 0
        self.drop_gradient()
        for lookup in self.lookups:
            lookup.ready = None

    def start(self, draw: Draw, seed: int, lookup: Lookup) -> None:
        """Put one lookup at its start, drawn apart from the model's own random numbers."""
        raise NotImplementedError

    def ascend(self, rule: Rule) -> None:
        """One step up the gradient of the last pass, which it consumes."""
        raise NotImplementedError

    def stepping(self, moments: Tensor | None) -> Callable[..., None]:
        """The op of this ascent: one that keeps moments has them; zeros in a search's first."""
        return ascend if moments is None else partial(moment_step, moments=moments, count=self.ascents)

    def move(self, step: Move) -> None:
        """One step of a method's own; consumes the gradient."""
        raise NotImplementedError(f"scope={self.scope!r} moves by ascents alone: use scope='sample' or 'token'")

    def norm(self, kind: str, site: int | None = None) -> Tensor:
        """The mean norm of the groups that carry a perturbation, of one site or of all; stays on the device.

        What is shared by all sites, a table's rows, has one norm.
        """
        raise NotImplementedError

    # Gradients

    def leaves(self) -> list[Tensor]:
        """The tensors by which a probe differentiates."""
        return [lookup.delta for lookup in self.lookups]

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Keep a probe's gradients, one per leaf."""
        for lookup, gradient in zip(self.lookups, gradients, strict=True):
            lookup.grad = gradient

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Around a full pass's backward: keep the gradients that it brings to the leaves."""
        yield
        for lookup in self.lookups:
            lookup.grad, lookup.delta.grad = lookup.delta.grad, None

    def drop_gradient(self) -> None:
        """Forget the last pass's gradient: the next ascent follows another."""
        for lookup in self.lookups:
            lookup.grad = None

    def has_gradient(self) -> bool:
        """Whether the last pass brought one."""
        return any(lookup.grad is not None for lookup in self.lookups)


@torch.no_grad()
def fill(
    delta: Tensor, draw: Draw, seed: int, mask: Tensor | None, call: int = 0, documents: Runs | None = None
) -> None:
    """Put the start of call `call` into `delta`: what `draw` gives, zero where `mask` is False."""
    mask = torch.ones(delta.shape[:-1], dtype=torch.bool, device=delta.device) if mask is None else mask
    with apart(seed, delta.device) if draw.random else contextlib.nullcontext():
        drawn = draw.at(tuple(delta.shape), mask, call, documents)
    if not isinstance(drawn, Tensor) or drawn.shape != delta.shape:
        got = tuple(drawn.shape) if isinstance(drawn, Tensor) else drawn
        raise ValueError(f"random_start(shape, mask) must return a tensor of shape {tuple(delta.shape)}, not {got!r}")
    delta.copy_(drawn.masked_fill(~mask.unsqueeze(-1).to(drawn.device), 0))


def mean_norm(norms: Sequence[Tensor]) -> Tensor:
    """The mean over the groups that are not zero."""
    if not norms:
        return torch.zeros((), device="cpu")
    every = torch.cat(list(norms))
    return every.sum() / (every > 0).sum().clamp(min=1)


def group_norms(delta: Tensor, leading: int, kind: str, documents: Runs | None = None) -> Tensor:
    """The norm of each group; the first `leading` dimensions index them (-1: all but one), or they are `documents`."""
    if delta.numel() == 0:
        return delta.new_zeros(0)
    leading = -1 if documents is not None else leading
    groups = delta.reshape(1, -1) if leading == 0 else delta.flatten(0, leading - 1 if leading > 0 else -2).flatten(1)
    norms = (l2_norm if kind == "l2" else largest)(groups, documents).flatten()
    return norms if documents is None else documents.firsts(norms)
