"""Scopes "table" and "row": one vector r per distinct token id.

The gradients of the positions are summed over equal ids before the ascent, and every position is moved by the row of
its id. For an untied embedding this is exactly what moving the table does. A plain lookup takes the rows themselves;
any other module's output takes one vector per position, to which the rows are copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.buffers import Buffers
from fastadv.engine.lookup import Lookup
from fastadv.engine.lookups import Lookups
from fastadv.engine.perturb.perturbation import NO_IDS, Perturbation, fill, group_norms, mean_norm
from fastadv.engine.perturb.ranks import Meeting
from fastadv.engine.perturb.rule import Rule
from fastadv.engine.perturb.segments import numbered, together
from fastadv.engine.perturb.shared_rows import SharedRows
from fastadv.engine.perturb.start import Draw
from fastadv.ops import segment_sum, table_step

IDS_FIRST = (
    "a random start in table scope needs all ids before the first perturbed pass, and this model calls its embedding "
    "several times: use clean_weight > 0, or scope='sample'"
)


class RowPerturbation(Perturbation):
    """One r for all lookups together."""

    def __init__(self, lookups: Lookups, scope: str, buffers: Buffers) -> None:
        super().__init__(lookups, scope, buffers)
        self._group = 0 if scope == "table" else 1
        self.rows: Tensor | None = None  # [R, D]; None: zero
        self._shared: SharedRows | None = None  # those of all ranks

    def divide(self, *, has_ids: bool) -> None:
        """Words are summed over all ranks that `process_group=` names, where each knows the ids of its own part."""
        if not has_ids or self.meeting is None:
            raise ValueError(NO_IDS)

    def zero_(self) -> None:
        """Back to no perturbation; a gradient stays."""
        super().zero_()
        self.rows = None
        if self._shared is not None:
            self._shared.rows.zero_()

    def start(self, draw: Draw, seed: int, lookup: Lookup) -> None:
        """Draw r for every distinct id, as soon as the ids are known."""
        if lookup is not self.lookups.items[0]:
            if len(self.lookups.segments().slot) != sum(other.delta[..., 0].numel() for other in self.lookups):
                raise NotImplementedError(IDS_FIRST)
            return  # drawn with the first lookup, for all of them
        if self.meeting is not None:
            shared = self._of_all_ranks(self.meeting)
            seed = self.meeting.tell(seed)[0][0]  # a word that several ranks have is moved alike
            fill(shared.rows, draw, seed, shared.occupied)
            self._r().copy_(shared.mine())
        else:
            groups = self.lookups.segments()
            occupied = groups.stops > groups.starts[:-1]  # by a position that is not masked
            fill(self._r(), draw, seed, occupied)
        self._spread()

    def ascend(self, rule: Rule) -> None:
        """Sum the positions' gradients over equal ids, move r, and give every position its row."""
        items = self.lookups.items
        if not self.has_gradient():
            return
        grad = together([_gradient(lookup) for lookup in items])
        alone = items[0] if len(items) == 1 and items[0].table is not None and not items[0].materialised else None
        self.ascents += 1
        if self.meeting is not None:
            self._step_over_ranks(self._of_all_ranks(self.meeting), grad, rule)
        elif alone is None or rule.moments:
            self._step(grad, rule)
        else:
            self._step_and_look_up(alone, grad, rule)
        self.drop_gradient()

    def _step(self, grad: Tensor, rule: Rule) -> None:
        self._move(self._r(), segment_sum(grad, self.lookups.segments(), fused=self.fused), rule)
        self._spread()

    def _move(self, rows: Tensor, grad: Tensor, rule: Rule) -> None:
        """Rows [R, D] by their own gradient."""
        self.stepping(self._moments(rows, rule))(
            rows,
            grad,
            skipped=self.buffers.skipped_on(grad.device),
            group=self._group,
            fused=self.fused,
            **rule._asdict(),
        )

    def _moments(self, rows: Tensor, rule: Rule) -> Tensor | None:
        """What the last ascent left; zeros in a search's first."""
        if not rule.moments:
            return None
        found = self.buffers.moments.of(rule.moments * len(rows), rows).view(rule.moments, *rows.shape)
        return found.zero_() if self.ascents == 1 else found

    def _step_and_look_up(self, lookup: Lookup, grad: Tensor, rule: Rule) -> None:
        """The usual case, one plain lookup: all of it in one op."""
        rows, written = self._r(), lookup.next_lookup()
        table_step(
            rows,
            grad,
            self.lookups.segments(),
            skipped=self.buffers.skipped_on(grad.device),
            group=self._group,
            room=self.buffers.scratch.of(len(rows), rows),
            fused=self.fused,
            **rule._asdict(),
            **written,
        )
        lookup.wrote(written)

    @torch.no_grad()
    def _step_over_ranks(self, shared: SharedRows, grad: Tensor, rule: Rule) -> None:
        """The same step on every rank, of the rows of all; each takes its own."""
        self._move(shared.rows, shared.summed(segment_sum(grad, self.lookups.segments(), fused=self.fused)), rule)
        self._r().copy_(shared.mine())
        self._spread()

    def _of_all_ranks(self, meeting: Meeting) -> SharedRows:
        if self._shared is None:
            own, (ids, rows) = self.lookups.segments(), numbered(self.lookups.items, self.lookups.places.modules)
            like = self.lookups.items[0].delta.detach()
            self._shared = SharedRows(meeting, own, ids, rows, like, self.fused)
        return self._shared

    def norm(self, kind: str, site: int | None = None) -> Tensor:  # noqa: ARG002
        """Of r: the whole of it, or the mean over words; of all ranks."""
        rows = self.rows if self._shared is None else self._shared.rows
        return mean_norm([] if rows is None else [group_norms(rows, self._group, kind)])

    def _r(self) -> Tensor:
        """r, at first zero; every lookup is given its slots in it."""
        if self.rows is None:
            items, groups = self.lookups.items, self.lookups.segments()
            self.rows = self.buffers.rows.of(len(groups.stops), items[0].delta.detach()).zero_()
            slots = torch.split(groups.slot, [lookup.delta[..., 0].numel() for lookup in items])
            for lookup, slot in zip(items, slots, strict=True):
                lookup.rows, lookup.slot = self.rows, slot.view(lookup.delta.shape[:-1])
        return self.rows

    @torch.no_grad()
    def _spread(self) -> None:
        """Copy the rows to the positions of lookups that cannot take rows."""
        for lookup in self.lookups:
            if lookup.materialised and lookup.rows is not None and lookup.slot is not None:
                spread = lookup.rows[lookup.slot.clamp(min=0)]
                lookup.delta.copy_(spread.masked_fill_((lookup.slot < 0).unsqueeze(-1), 0))


def _gradient(lookup: Lookup) -> Tensor:
    """[N, D], one row per position."""
    grad = torch.zeros_like(lookup.delta) if lookup.grad is None else lookup.grad
    return grad.reshape(-1, grad.shape[-1])
