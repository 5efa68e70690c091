r"""Move rows of a table in place, and put them back: find those touched, copy them, step, restore.

.. math:: W_n \leftarrow S_n + \Pi\big(W_n - S_n + \text{step} \cdot d(g_n)\big), \qquad n \in \text{rows}

W [V, D] is the table, g [V, D] its gradient, S [R, D] the copies of the rows that move. The directions d and balls are
those of `fastadv.ops.ascend`; without a ball W moves by the step alone, and S is not needed. A gradient is zero
outside of the words of a batch, so its touched rows are all that a step can move: `None` stands for every row.

Computed in float32 (float64 for float64), rounded once into the table. Where a group's gradient is zero or not finite
nothing changes at all; one that is not finite is counted in `skipped`. `restore` puts back every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments import signatures
from fastadv.arguments.rule import Rule
from fastadv.native import rows as native_rows
from fastadv.ops.ascend import project, with_norm
from fastadv.ops.dispatch import Backend, Op, in_place


@torch.no_grad()
def eager_touched(table: Tensor) -> Tensor:
    """`touched` in plain PyTorch."""
    return (table != 0).any(dim=1).nonzero().flatten()


@torch.no_grad()
def eager_back_up(table: Tensor, rows: Tensor | None) -> Tensor:
    """`back_up` in plain PyTorch."""
    return table.clone(memory_format=torch.contiguous_format) if rows is None else table.index_select(0, rows)


@torch.no_grad()
def eager_restore(table: Tensor, saved: Tensor, rows: Tensor | None) -> None:
    """`restore` in plain PyTorch."""
    if rows is None:
        signatures.ROWS_RESTORE.check_shapes((table, saved))
    else:
        signatures.SOME_ROWS_RESTORE.check_shapes((table, rows, saved))
    _put(table, saved, rows)


def _put(table: Tensor, saved: Tensor, rows: Tensor | None) -> None:
    if rows is None:
        table.copy_(saved)
    else:
        table.index_copy_(0, rows, saved)


@torch.no_grad()
def eager_step(
    table: Tensor,
    grad: Tensor,
    saved: Tensor | None,
    rows: Tensor | None,
    skipped: Tensor,
    rule: Rule,
) -> None:
    """`step` in plain PyTorch."""
    native_rows.check_step(rule, saved)
    if rows is None:
        signatures.ROWS_STEP.check_shapes((table, grad, skipped, saved))
    else:
        signatures.SOME_ROWS_STEP.check_shapes((table, grad, skipped, rows, saved))
    step_size, epsilon, direction, ball, group = rule
    before = table if rows is None else table.index_select(0, rows)
    if before.numel() == 0:
        return
    groups = (1, -1) if group == 0 else before.shape
    wide = torch.promote_types(table.dtype, torch.float32)
    g = (grad if rows is None else grad.index_select(0, rows)).to(wide).reshape(groups)
    finite = g.isfinite().all(dim=1, keepdim=True)
    skipped += (~finite).sum()
    g = torch.where(finite, g, 0)
    at = before.to(wide).reshape(groups)
    moved = at + (step_size * g.sign() if direction == "sign" else with_norm(g, step_size, direction))
    if rule.bounded and saved is not None:
        centre = saved.to(wide).reshape(groups)
        moved = centre + project(moved - centre, epsilon, ball, direction)
    after = moved.reshape(before.shape).to(table.dtype)
    stays = (g == 0).all(dim=1, keepdim=True)
    _put(table, torch.where(stays if group else stays.reshape(()), before, after), rows)


def _fake_touched(table: Tensor) -> Tensor:
    return table.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _fake_back_up(table: Tensor, rows: Tensor | None) -> Tensor:
    return table.new_empty((table.shape[0] if rows is None else rows.shape[0], table.shape[1]))


def _op(
    name: str,
    schema: str,
    eager: Callable[..., Any],
    fake: Callable[..., Any],
    on_cuda: Backend | None = None,
    **more: Any,
) -> Op:
    function = getattr(native_rows, name)
    on_cpu = Backend("C++", "cpu", function, native.reason)
    on_cuda = on_cuda or Backend("CUDA C++", "cuda", function, native.cuda_reason)
    return Op(name, schema, eager=eager, fake=fake, backends=[on_cpu, on_cuda], **more)


# The count lives on the device, so this synchronises, and PyTorch's version is as fast as any.
TOUCHED = _op(
    "rows_touched", "(Tensor table) -> Tensor", eager_touched, _fake_touched, Backend("PyTorch", "cuda", eager_touched)
)
BACK_UP = _op("rows_back_up", "(Tensor table, Tensor? rows) -> Tensor", eager_back_up, _fake_back_up)
RESTORE = _op("rows_restore", "(Tensor(a!) table, Tensor saved, Tensor? rows) -> ()", eager_restore, in_place)
STEP = _op(
    "rows_step",
    "(Tensor(a!) table, Tensor grad, Tensor? saved, Tensor? rows, Tensor(b!) skipped, float step_size, "
    "float? epsilon, str direction, str ball, int group) -> ()",
    eager_step,
    in_place,
    unpack=lambda *flat: (*flat[:5], Rule._make(flat[5:])),
)


def touched(table: Tensor, *, fused: bool | None = None) -> Tensor:
    """The rows of `table` [V, D] that hold anything but zero (NaN is something, -0.0 is not): int64, ascending.

    Examples:
        >>> touched(torch.tensor([[0.0, 0.0], [0.0, 2.0]]))
        tensor([1])
    """
    found: Tensor = TOUCHED.on(table, fused)(table)
    return found


def back_up(table: Tensor, rows: Tensor | None = None, *, fused: bool | None = None) -> Tensor:
    """A copy [R, D] of `rows` (int64, strictly ascending) of `table` [V, D]; of all of them without `rows`.

    Raises:
        IndexError: a row outside the table (on the CPU).

    Examples:
        >>> back_up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1]))
        tensor([[3., 4.]])
    """
    saved: Tensor = BACK_UP.on(table, fused)(table, rows)
    return saved


def restore(table: Tensor, saved: Tensor, rows: Tensor | None = None, *, fused: bool | None = None) -> None:
    """Put the copies `saved` [R, D] of `rows` back into `table` [V, D], bit for bit.

    Raises:
        ValueError: shapes that do not fit.
        IndexError: a row outside the table (on the CPU).

    Examples:
        >>> table, rows = torch.ones(3, 2), torch.tensor([0, 2])
        >>> saved = back_up(table, rows)
        >>> table[0] = float("nan")
        >>> restore(table, saved, rows)
        >>> table.sum()
        tensor(6.)
    """
    RESTORE.on(table, fused)(table, saved, rows)


def step(
    table: Tensor,
    grad: Tensor,
    *,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str = "l2",
    ball: str = "l2",
    group: int = 0,
    saved: Tensor | None = None,
    rows: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """Move `rows` of `table` [V, D] one step up `grad` [V, D], in place; see the module's formula.

    `group` is 0 for norms over all the rows together, 1 for each row by itself. `saved` [R, D] holds the rows at the
    centre of the ball, in the order of `rows` (int64, strictly ascending; None: every row).

    Raises:
        TypeError: dtypes that differ, or that the chosen backend does not serve.
        ValueError: an unknown direction or ball, shapes that do not fit, or a ball without `saved`.
        IndexError: a row outside the table (on the CPU).

    Examples:
        >>> table, skipped = torch.ones(2, 2), torch.zeros((), dtype=torch.int64)
        >>> saved, grad = back_up(table), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> step(table, grad, skipped=skipped, step_size=1.0, epsilon=0.5, saved=saved)
        >>> table
        tensor([[1.0000, 1.0000],
                [1.3000, 1.4000]])
    """
    rule = Rule(step_size, epsilon, direction, ball, group)
    STEP.on(table, fused)(table, grad, saved, rows, skipped, rule)
