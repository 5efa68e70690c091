from __future__ import annotations
import torch
from fastadv.ops import ascend as _a
import sys
from torch import Tensor
def rows_touched(table, fused=None): return (table != 0).any(1).nonzero().squeeze(1)
def rows_back_up(table, rows, fused=None): return table.clone() if rows is None else table[rows]
@torch.no_grad()
def rows_restore(table, saved, rows, fused=None):
    table.copy_(saved) if rows is None else table.index_copy_(0, rows, saved)
@torch.no_grad()
def rows_step(table, grad, *, saved, rows, skipped, step_size, epsilon, direction, ball, group, fused=None):
    g = grad if rows is None else grad[rows]
    t = table if rows is None else table[rows]
    wide = torch.promote_types(t.dtype, torch.float32)
    r = (t.to(wide) - saved.to(wide))
    _a(r, g.to(wide), skipped=skipped, step_size=step_size, epsilon=epsilon, direction=direction, ball=ball, group=group, fused=False)
    new = (saved.to(wide) + r).to(t.dtype)
    rows_restore(table, new, rows)
