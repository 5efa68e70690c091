"""The perturbation of a step, by scope: one vector per position, or one per distinct token id.

In table scopes the gradient of the positions is summed over equal ids before the ascent, and every position is moved by
the row of its id, which for an untied embedding is exactly what moving the table would do. A plain lookup takes the
rows themselves; any other module sees one vector per position (`Call.delta`), into which the rows are spread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fastadv.engine.call import Call
from fastadv.engine.groups import together
from fastadv.engine.rng import apart
from fastadv.engine.rule import Rule
from fastadv.engine.site import Site
from fastadv.engine.start import Draw
from fastadv.ops import ascend, segment_sum, table_step
from fastadv.ops.ascend import l2_norm

Move = Callable[[int, Tensor, Tensor], Tensor]  # a call's index, its delta and gradient -> its next delta
SCOPES = ("table", "row", "batch", "sample", "token")
TABLE_SCOPES = ("table", "row")


class Perturbation:
    """What the scopes share: the site's calls, and the count of groups that took no step."""

    in_place = False  # whether weights are moved, instead of what the site's calls return

    def __init__(self, site: Site, scope: str) -> None:
        self.site = site
        self.scope = scope
        self.skipped = torch.zeros((), dtype=torch.int64, device="cpu")

    def begin(self) -> None:
        """A new step."""
        self.reset()

    def reset(self) -> None:
        """Forget what an earlier ascent found."""

    def start(self, draw: Draw, seed: int, call: Call) -> None:
        """Fill `call` with its start, drawn apart from the model's own random numbers."""
        raise NotImplementedError

    def ascend(self, rule: Rule) -> None:
        """One step up the gradient that the last pass left in the calls; consumes it."""
        raise NotImplementedError

    def move(self, step: Move) -> None:
        """One step of the method's own. Consumes the gradient."""
        raise NotImplementedError(f"scope={self.scope!r} moves by ascents alone: use scope='sample' or 'token'")

    def norm(self, kind: str) -> Tensor:
        """The mean norm of the groups that carry a perturbation; stays on the device."""
        raise NotImplementedError

    # Where gradients come from

    def leaves(self) -> list[Tensor]:
        """What a probe differentiates by."""
        return [call.delta for call in self.site.calls]

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """What a probe found."""
        for call, gradient in zip(self.site.calls, gradients, strict=True):
            call.grad = gradient

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Keep what a full pass finds."""
        yield
        for call in self.site.calls:
            call.grad, call.delta.grad = call.delta.grad, None

    def has_gradient(self) -> bool:
        """Whether the last pass left one."""
        return any(call.grad is not None for call in self.site.calls)

    def memory(self) -> list[Tensor]:
        """What serves from step to step, besides the site's calls."""
        return [self.skipped]

    def count_on(self, device: torch.device) -> Tensor:
        """The counter of skipped groups, on the device of what is stepped."""
        if self.skipped.device != device:
            self.skipped = self.skipped.to(device, non_blocking=True)
        return self.skipped


class PositionPerturbation(Perturbation):
    """Scopes "batch", "sample" and "token": each call of the embedding has a perturbation and a ball of its own."""

    def start(self, draw: Draw, seed: int, call: Call) -> None:
        """Draw delta for every position."""
        index = next(i for i, other in enumerate(self.site.calls) if other is call)
        fill(call.delta, draw, seed + index, call.mask, index)

    def ascend(self, rule: Rule) -> None:
        """Each call by itself."""
        for call in self.site.calls:
            if call.grad is not None:
                self._step(call, call.grad, rule)
                call.grad = None

    def _step(self, call: Call, grad: Tensor, rule: Rule) -> None:
        lookup = call.next_lookup()
        ascend(
            call.delta,
            grad,
            mask=call.mask,
            skipped=self.count_on(grad.device),
            group=self._group(call.delta, rule),
            fused=self.site.fused,
            **rule._asdict(),
            **lookup,
        )
        call.embedded(lookup)

    @torch.no_grad()
    def move(self, step: Move) -> None:
        """Each call by itself."""
        for index, call in enumerate(self.site.calls):
            if call.grad is not None:
                moved = step(index, call.delta.detach(), masked(call.grad.to(call.delta.dtype), call.mask))
                call.delta.copy_(masked(moved, call.mask))
                call.grad = call.ready = None

    def _group(self, delta: Tensor, rule: Rule) -> int:
        if rule.direction == "sign":
            return 1  # nothing is normalised; a sample stands or falls by itself
        return {"batch": 0, "sample": 1, "token": delta.ndim - 1}[self.scope]

    def norm(self, kind: str) -> Tensor:
        """Over the groups of all calls."""
        leading = {"batch": 0, "sample": 1, "token": -1}[self.scope]
        return mean_norm([call.delta.detach() for call in self.site.calls], leading, kind)


class TablePerturbation(Perturbation):
    """Scopes "table" and "row": one vector per distinct id of all calls together."""

    def __init__(self, site: Site, scope: str) -> None:
        super().__init__(site, scope)
        self._group = 0 if scope == "table" else 1
        self.rows: Tensor | None = None  # r [rows, D]
        self._room, self._other_room = Room(), Room()

    def reset(self) -> None:
        """The next batch has other ids."""
        self.rows = None

    def start(self, draw: Draw, seed: int, call: Call) -> None:
        """Draw r for every distinct id, as soon as the ids are known."""
        if call is not self.site.calls[0]:
            if len(self.site.grouped().slot) != sum(other.delta[..., 0].numel() for other in self.site.calls):
                raise NotImplementedError(
                    "a random start in table scope needs all ids before the first perturbed pass, and this model "
                    "calls its embedding several times: use clean_weight > 0, or scope='sample'"
                )
            return  # drawn with the first call, for all of them
        groups = self.site.grouped()
        occupied = groups.stops > groups.starts[:-1]  # by a position that is not masked
        fill(self._rows(), draw, seed, occupied)
        self._spread()

    def ascend(self, rule: Rule) -> None:
        """Sum the positions' gradients over equal ids, move r, and let every position have its row."""
        calls = self.site.calls
        if all(call.grad is None for call in calls):
            return
        grad = together([_gradient(call) for call in calls])
        alone = calls[0] if len(calls) == 1 and calls[0].table is not None and not calls[0].body else None
        if alone is None:
            self._step(grad, rule)
        else:
            self._step_and_look_up(alone, grad, rule)
        for call in calls:
            call.grad = None

    def _step(self, grad: Tensor, rule: Rule) -> None:
        rows, groups = self._rows(), self.site.grouped()
        ascend(
            rows,
            segment_sum(grad, groups, fused=self.site.fused),
            skipped=self.count_on(grad.device),
            group=self._group,
            fused=self.site.fused,
            **rule._asdict(),
        )
        self._spread()

    def _step_and_look_up(self, call: Call, grad: Tensor, rule: Rule) -> None:
        """The usual case, one plain lookup: all of it in one op."""
        rows, lookup = self._rows(), call.next_lookup()
        table_step(
            rows,
            grad,
            self.site.grouped(),
            skipped=self.count_on(grad.device),
            group=self._group,
            room=self._other_room.rows(rows),
            fused=self.site.fused,
            **rule._asdict(),
            **lookup,
        )
        call.embedded(lookup)

    def norm(self, kind: str) -> Tensor:
        """Of r: the whole of it, or the mean over words."""
        return mean_norm([] if self.rows is None else [self.rows], self._group, kind)

    def memory(self) -> list[Tensor]:
        """The rows' as well."""
        return [*super().memory(), self._room.memory, self._other_room.memory]

    def _rows(self) -> Tensor:
        """r, zero to begin with, in memory that serves from step to step; every call is told its slots."""
        if self.rows is None:
            calls, groups = self.site.calls, self.site.grouped()
            delta = calls[0].delta.detach()
            self.rows = self._room.rows(delta, len(groups.stops)).zero_()
            slots = torch.split(groups.slot, [call.delta[..., 0].numel() for call in calls])
            for call, slot in zip(calls, slots, strict=True):
                call.rows, call.slot = self.rows, slot.view(call.delta.shape[:-1])
        return self.rows

    @torch.no_grad()
    def _spread(self) -> None:
        """Where a call has no use for rows, every position gets its own copy."""
        for call in self.site.calls:
            if call.body and call.rows is not None and call.slot is not None:
                spread = call.rows[call.slot.clamp(min=0)]
                call.delta.copy_(spread.masked_fill_((call.slot < 0).unsqueeze(-1), 0))


class Room:
    """Memory for rows, as many as a batch happens to need; it serves from step to step."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def rows(self, like: Tensor, count: int | None = None) -> Tensor:
        """[count, D], or as many as `like` has, in the dtype of `like`; whatever they held last."""
        count, dim = like.shape[0] if count is None else count, like.shape[-1]
        memory = self.memory
        if memory.dtype != like.dtype or memory.device != like.device or memory.numel() < count * dim:
            self.memory = like.new_empty(count * dim * 5 // 4)  # the next batch may have some more
        return self.memory[: count * dim].view(count, dim)


@torch.no_grad()
def fill(delta: Tensor, draw: Draw, seed: int, mask: Tensor | None, call: int = 0) -> None:
    """Put the start that `draw` gives `call` into `delta`, zero where `mask` says that nothing is."""
    mask = torch.ones(delta.shape[:-1], dtype=torch.bool, device=delta.device) if mask is None else mask
    with apart(seed, delta.device) if draw.random else contextlib.nullcontext():
        drawn = draw.at(tuple(delta.shape), mask, call)
    if not isinstance(drawn, Tensor) or drawn.shape != delta.shape:
        what = tuple(drawn.shape) if isinstance(drawn, Tensor) else drawn
        raise ValueError(f"random_start(shape, mask) must return a tensor of shape {tuple(delta.shape)}, not {what!r}")
    delta.copy_(drawn.masked_fill(~mask.unsqueeze(-1).to(drawn.device), 0))


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where the mask says that nothing is."""
    return values if mask is None else values.masked_fill(~mask.unsqueeze(-1), 0)


def _gradient(call: Call) -> Tensor:
    """[N, D], one row per position."""
    grad = torch.zeros_like(call.delta) if call.grad is None else call.grad
    return grad.reshape(-1, grad.shape[-1])


def mean_norm(deltas: Sequence[Tensor], leading: int, kind: str) -> Tensor:
    """The mean over the groups that are not zero; the first `leading` dimensions index the groups."""
    if not deltas:
        return torch.zeros(())
    every = torch.cat([_norms(delta, leading, kind).flatten() for delta in deltas])
    return every.sum() / (every > 0).sum().clamp(min=1)


def _norms(delta: Tensor, leading: int, kind: str) -> Tensor:
    """The norm of each group, which the first `leading` dimensions index (-1: all but the last)."""
    if delta.numel() == 0:
        return delta.new_zeros(0)
    groups = delta.reshape(1, -1) if leading == 0 else delta.flatten(0, leading - 1 if leading > 0 else -2).flatten(1)
    return l2_norm(groups) if kind == "l2" else groups.abs().amax(dim=1, keepdim=True)
