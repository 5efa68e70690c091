"""Move one table in place, and with it all that shares its memory; put it back bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.engine.perturb.rule import Rule
from fastadv.ops import rows


class TableRollback:
    """One table, and the rows of it that have moved.

    Only rows whose gradient is not zero move, so only these are backed up. Where more than half of them do (the
    gradient of a tied output layer touches every row), the whole table is.
    """

    def __init__(self, table: Tensor, fused: bool | None = None) -> None:
        self.table = table.detach() if table.dim() == 2 else table.detach().reshape(1, -1)
        self.fused = fused
        self.rows: Tensor | None = None  # those in `saved`; None: all
        self.saved: Tensor | None = None  # their values; None: nothing has moved

    def step(self, grad: Tensor, rule: Rule, group: int, skipped: Tensor) -> None:
        """Ascend once up `grad`, a gradient of the whole table."""
        grad = grad.detach().reshape(self.table.shape)
        self._back_up(grad)
        rows.step(
            self.table,
            grad,
            saved=self.saved,
            rows=self.rows,
            skipped=skipped,
            group=group,
            fused=self.fused,
            **rule._asdict(),
        )
        torch.clear_autocast_cache()  # it keeps casts by tensor, and does not see that one was written to

    def perturbation(self) -> Tensor | None:
        """The change of the rows that have moved, [R, D]."""
        if self.saved is None:
            return None
        moved = self.table if self.rows is None else self.table[self.rows]
        wide = torch.promote_types(moved.dtype, torch.float32)
        return moved.to(wide) - self.saved.to(wide)

    def restore(self) -> None:
        """Put back the rows that have moved."""
        if self.saved is not None:
            rows.restore(self.table, self.saved, self.rows, fused=self.fused)
            torch.clear_autocast_cache()
        self.rows = self.saved = None

    def _back_up(self, grad: Tensor) -> None:
        if self.saved is not None and self.rows is None:
            return
        touched = rows.touched(grad, fused=self.fused)
        if self.rows is not None:  # a later step may reach rows that an earlier one did not
            touched = touched[~torch.isin(touched, self.rows)]
        known = 0 if self.rows is None else len(self.rows)
        if 2 * (known + len(touched)) > len(self.table):
            self._back_up_all()
        elif self.rows is None or self.saved is None:
            self.rows, self.saved = touched, rows.back_up(self.table, touched, fused=self.fused)
        elif len(touched):
            self._add(self.rows, self.saved, touched)

    def _add(self, known: Tensor, saved: Tensor, touched: Tensor) -> None:
        every, order = torch.cat([known, touched]).sort()
        copies = torch.cat([saved, rows.back_up(self.table, touched, fused=self.fused)])[order]
        self.rows, self.saved = every, copies  # together: an error above leaves what can be put back

    def _back_up_all(self) -> None:
        every = rows.back_up(self.table, fused=self.fused)
        if self.saved is not None and self.rows is not None:
            every[self.rows] = self.saved
        self.rows, self.saved = None, every
