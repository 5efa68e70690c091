"""The perturbation of a step, by scope: one vector per position, or one per distinct token id.

The model only ever sees one vector per position (`Call.delta`). In table scopes the gradient of the positions is summed
over equal ids before the ascent and the table's rows are spread over the positions after it, which for an untied
embedding is exactly what moving the table would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.engine.rng import apart
from fastadv.engine.site import Call, Site
from fastadv.engine.start import Start
from fastadv.ops import Segments, ascend, segment_sum, segments
from fastadv.ops.ascend import l2_norm

SCOPES = ("table", "row", "batch", "sample", "token")
TABLE_SCOPES = ("table", "row")


class Rule(NamedTuple):
    """How a method ascends: see `fastadv.ops.ascend`."""

    step_size: float
    epsilon: float | None
    direction: str
    ball: str


class Perturbation:
    """What the scopes share: the site's calls, and the count of groups that took no step."""

    def __init__(self, site: Site, scope: str) -> None:
        self.site = site
        self.scope = scope
        self.skipped = torch.zeros((), dtype=torch.int64)

    def reset(self) -> None:
        """Forget what an earlier step found."""

    def start(self, draw: Start, seed: int, call: Call) -> None:
        """Fill `call` with its start, drawn apart from the model's own random numbers."""
        raise NotImplementedError

    def ascend(self, rule: Rule) -> None:
        """One step up the gradient that the last pass left in the calls; consumes it."""
        raise NotImplementedError

    def norm(self, kind: str) -> Tensor:
        """The mean norm of the groups that carry a perturbation; stays on the device."""
        raise NotImplementedError

    def _step(self, delta: Tensor, grad: Tensor, mask: Tensor | None, rule: Rule, group: int) -> None:
        if self.skipped.device != delta.device:
            self.skipped = self.skipped.to(delta.device)
        ascend(delta, grad, mask=mask, skipped=self.skipped, group=group, fused=self.site.fused, **rule._asdict())


class PositionPerturbation(Perturbation):
    """Scopes "batch", "sample" and "token": each call of the embedding has a perturbation and a ball of its own."""

    def start(self, draw: Start, seed: int, call: Call) -> None:
        """Draw delta for every position."""
        index = next(i for i, other in enumerate(self.site.calls) if other is call)
        fill(call.delta, draw, seed + index, call.mask)

    def ascend(self, rule: Rule) -> None:
        """Each call by itself."""
        for call in self.site.calls:
            if call.grad is not None:
                self._step(call.delta, call.grad, call.mask, rule, self._group(call.delta, rule))
                call.grad = None

    def _group(self, delta: Tensor, rule: Rule) -> int:
        if rule.direction == "sign":
            return 1  # nothing is normalised; a sample stands or falls by itself
        return {"batch": 0, "sample": 1, "token": delta.ndim - 1}[self.scope]

    def norm(self, kind: str) -> Tensor:
        """Over the groups of all calls."""
        leading = {"batch": 0, "sample": 1, "token": -1}[self.scope]
        norms = [_norms(call.delta.detach(), leading, kind) for call in self.site.calls]
        return _mean_of_nonzero(norms)


class TablePerturbation(Perturbation):
    """Scopes "table" and "row": one vector per distinct id of all calls together."""

    def __init__(self, site: Site, scope: str, vocabularies: Sequence[int]) -> None:
        super().__init__(site, scope)
        self.vocabularies = vocabularies
        self.rows: Tensor | None = None  # r [rows, D]
        self.groups: Segments | None = None

    def reset(self) -> None:
        """The next batch has other ids."""
        self.rows = self.groups = None

    def start(self, draw: Start, seed: int, call: Call) -> None:
        """Draw r for every distinct id, as soon as the ids are known."""
        if call is not self.site.calls[0]:
            if len(self._plan().slot) != sum(_ids(other).numel() for other in self.site.calls):
                raise NotImplementedError(
                    "a random start in table scope needs all ids before the first perturbed pass, and this model "
                    "calls its embedding several times: use clean_weight > 0, or scope='sample'"
                )
            return  # drawn with the first call, for all of them
        rows = self._room(call)
        fill(rows, draw, seed, self._occupied())
        self._spread()

    def ascend(self, rule: Rule) -> None:
        """Sum the positions' gradients over equal ids, move r, and spread it over the positions."""
        calls = self.site.calls
        if all(call.grad is None for call in calls):
            return
        grad = segment_sum(torch.cat([_masked_gradient(call) for call in calls]), self._plan(), fused=self.site.fused)
        self._step(self._room(calls[0]), grad, None, rule, group=0 if self.scope == "table" else 1)
        for call in calls:
            call.grad = None
        self._spread()

    def norm(self, kind: str) -> Tensor:
        """Of r: the whole of it, or the mean over words."""
        if self.rows is None:
            return torch.zeros(())
        return _mean_of_nonzero([_norms(self.rows, 0 if self.scope == "table" else 1, kind)])

    def _plan(self) -> Segments:
        """One sort per batch, shared by all of its steps."""
        if self.groups is None:
            offsets = [sum(self.vocabularies[: call.module]) for call in self.site.calls]
            ids = [
                _ids(call).reshape(-1).long() + offset for call, offset in zip(self.site.calls, offsets, strict=True)
            ]
            self.groups = segments(torch.cat(ids), sum(self.vocabularies))
        return self.groups

    def _room(self, call: Call) -> Tensor:
        if self.rows is None:
            self.rows = call.delta.new_zeros((len(self._plan().starts) - 1, call.delta.shape[-1])).detach()
        return self.rows

    def _occupied(self) -> Tensor:
        """Which rows have a position that is not masked."""
        marks = [_mask(call).reshape(-1, 1).float() for call in self.site.calls]
        return segment_sum(torch.cat(marks), self._plan(), fused=self.site.fused).squeeze(1) > 0

    @torch.no_grad()
    def _spread(self) -> None:
        assert self.rows is not None
        slots = torch.split(self._plan().slot, [_ids(call).numel() for call in self.site.calls])
        for call, slot in zip(self.site.calls, slots, strict=True):
            call.delta.copy_(self.rows[slot].reshape(call.delta.shape))
            if call.mask is not None:
                call.delta.masked_fill_(~call.mask.unsqueeze(-1), 0)


@torch.no_grad()
def fill(delta: Tensor, draw: Start, seed: int, mask: Tensor | None) -> None:
    """Put the start that `draw` gives into `delta`, zero where `mask` says that nothing is."""
    mask = torch.ones(delta.shape[:-1], dtype=torch.bool, device=delta.device) if mask is None else mask
    with apart(seed, delta.device):
        drawn = draw(tuple(delta.shape), mask)
    if not isinstance(drawn, Tensor) or drawn.shape != delta.shape:
        what = tuple(drawn.shape) if isinstance(drawn, Tensor) else drawn
        raise ValueError(f"random_start(shape, mask) must return a tensor of shape {tuple(delta.shape)}, not {what!r}")
    delta.copy_(drawn.masked_fill(~mask.unsqueeze(-1).to(drawn.device), 0))


def _ids(call: Call) -> Tensor:
    assert call.ids is not None
    return call.ids


def _mask(call: Call) -> Tensor:
    return torch.ones_like(_ids(call), dtype=torch.bool) if call.mask is None else call.mask


def _masked_gradient(call: Call) -> Tensor:
    grad = torch.zeros_like(call.delta) if call.grad is None else call.grad
    if call.mask is not None:
        grad = grad.masked_fill(~call.mask.unsqueeze(-1), 0)
    return grad.reshape(-1, grad.shape[-1])


def _norms(delta: Tensor, leading: int, kind: str) -> Tensor:
    """The norm of each group, which the first `leading` dimensions index (-1: all but the last)."""
    if delta.numel() == 0:
        return delta.new_zeros(0)
    groups = delta.reshape(1, -1) if leading == 0 else delta.flatten(0, leading - 1 if leading > 0 else -2).flatten(1)
    return l2_norm(groups) if kind == "l2" else groups.abs().amax(dim=1, keepdim=True)


def _mean_of_nonzero(norms: list[Tensor]) -> Tensor:
    if not norms:
        return torch.zeros(())
    every = torch.cat([norm.flatten() for norm in norms])
    return every.sum() / (every > 0).sum().clamp(min=1)
