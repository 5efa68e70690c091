"""The launchers of csrc/rows: every check, then addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.native import checks
from fastadv.native.ascend import BALLS, DIRECTIONS
from fastadv.native.flags import destination


def rows_touched(table: Tensor) -> Tensor:
    """The rows of `table` that hold anything but zero: NaN is something, -0.0 is not.

    Nothing is mutated. One read of the table; a row that holds something is left at its first find.

    Args:
        table: [V, D], float32, float64, bfloat16 or float16; copied if the elements of a row are not adjacent.

    Returns:
        int64, ascending.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: it is not a table.
        RuntimeError: the extension is not there for this device.

    Example:
        >>> rows_touched(torch.tensor([[0.0, -0.0], [0.0, 2.0], [float("nan"), 0.0]]))
        tensor([1, 2])
    """
    op = "rows_touched"
    extension = checks.extension_on_cpu(op, table)
    _check_table(op, "table", table)
    table = _with_adjacent_elements(table)
    found = torch.empty(table.shape[0], dtype=torch.int64, device=table.device)  # the default may be another
    count = extension.rows_touched_cpu(
        _call(op, extension, table, None, None, None), found.data_ptr(), torch.get_num_threads()
    )
    return found[:count].clone()


def rows_back_up(table: Tensor, rows: Tensor | None) -> Tensor:
    """A copy of `rows` of the table, bit for bit.

    Nothing is mutated.

    Args:
        table: [V, D], float32, float64, bfloat16 or float16; copied if the elements of a row are not adjacent.
        rows: int64 [R], strictly ascending; None: every row.

    Returns:
        [R, D], or [V, D], in the table's dtype, contiguous.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape or device that does not fit, or rows out of order.
        IndexError: a row outside the table; nothing has been read then. (On CUDA it is left out, and `flags.check`
            raises.)
        RuntimeError: the extension is not there for this device.

    Example:
        >>> rows_back_up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1]))
        tensor([[3., 4.]])
    """
    op = "rows_back_up"
    extension = checks.extension_for(op, table)
    _check_table(op, "table", table)
    rows = _check_rows(op, rows, table)
    table = _with_adjacent_elements(table)
    saved = table.new_empty((table.shape[0] if rows is None else rows.shape[0], table.shape[1]))
    _copy(extension, _call(op, extension, table, None, saved, rows), False, table.device)
    return saved


def rows_restore(table: Tensor, saved: Tensor, rows: Tensor | None) -> None:
    """Put the copies back, bit for bit. Mutated: `table`.

    Args:
        table: [V, D], float32, float64, bfloat16 or float16; rows may be strided, elements of a row may not.
        saved: [R, D] in the table's dtype, contiguous, sharing no memory with it.
        rows: int64 [R], strictly ascending: where row r of `saved` belongs; None: every row.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit, or rows out of order.
        IndexError: a row outside the table; nothing has been written then. (On CUDA: as in `rows_back_up`.)
        RuntimeError: the extension is not there for this device.

    Example:
        >>> table = torch.zeros(2, 2)
        >>> rows_restore(table, torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
        >>> table
        tensor([[0., 0.],
                [3., 4.]])
    """
    op = "rows_restore"
    extension = checks.extension_for(op, table)
    _check_table(op, "table", table)
    _check_in_place(op, table)
    rows = _check_rows(op, rows, table)
    _check_saved(op, saved, table, rows)
    _copy(extension, _call(op, extension, table, None, saved, rows), True, table.device)
    increment_version((table,))


def rows_step(
    table: Tensor,
    grad: Tensor,
    saved: Tensor | None,
    rows: Tensor | None,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
) -> None:
    r"""Move rows of the table one step up their gradient, and back onto the ball around their copies, in place.

    .. math:: W_n \leftarrow S_n + \Pi\big(W_n - S_n + \text{step} \cdot d(g_n)\big)

    `fastadv.ops.ascend` lists the directions d and balls. Mutated: `table` and `skipped`, which share no memory with
    each other or with what is read. The result does not depend on the number of threads.

    Args:
        table: [V, D], float32, float64, bfloat16 or float16; rows may be strided, elements of a row may not.
        grad: [V, D] in the table's dtype; copied if the elements of a row are not adjacent.
        saved: [R, D] in the table's dtype, contiguous: the rows at the centre of the ball, in the order of `rows`.
            Not read without a ball.
        rows: int64 [R], strictly ascending: the rows that move; None: every row.
        skipped: int64, 0-d: grows by the number of groups whose gradient is not finite.
        step_size: the length of the step.
        epsilon: the ball's radius, or None for no ball.
        direction: "l2", "sign" or "max".
        ball: "l2", "linf", "unit" or "none".
        group: 0 for norms over all the rows together, 1 for each row by itself.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride, device, direction or ball that does not fit, or rows out of order.
        IndexError: a row outside the table; nothing has been written then. (On CUDA: as in `rows_back_up`.)
        RuntimeError: the extension is not there for this device.

    Example:
        >>> table, skipped = torch.ones(3, 2), torch.zeros((), dtype=torch.int64)
        >>> grad, rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), torch.tensor([1])
        >>> rows_step(table, grad, None, rows, skipped, 0.5, None, "l2", "none", 0)
        >>> table
        tensor([[1.0000, 1.0000],
                [1.3000, 1.4000],
                [1.0000, 1.0000]])
    """
    op = "rows_step"
    extension = checks.extension_for(op, table)
    _check_table(op, "table", table)
    _check_in_place(op, table)
    _check_rule(op, direction, ball, group)
    ball = "none" if epsilon is None else ball
    rows = _check_rows(op, rows, table)
    grad = _check_grad(op, grad, table)
    if ball == "none":
        saved = None
    elif saved is None:
        raise ValueError(f"{op}: ball={ball!r} is around the rows as they were: saved cannot be None")
    else:
        _check_saved(op, saved, table, rows)
    _check_skipped(op, skipped, table)
    rule = extension.RowsRule(
        step_size,
        0.0 if epsilon is None else epsilon,
        DIRECTIONS[direction],
        BALLS[ball],
        group == 1,
        checks.address(op, "skipped", skipped),
    )
    call = _call(op, extension, table, grad, saved, rows)
    if table.device.type == "cpu":
        extension.rows_step_cpu(call, rule, torch.get_num_threads())
    else:
        room = torch.empty(0 if group else 5 * extension.rows_parts, dtype=torch.float64, device=table.device)
        extension.rows_step_cuda(call, rule, room.data_ptr(), destination(extension, table.device))
    increment_version((table, skipped))


def _copy(extension: Any, call: Any, back: bool, device: torch.device) -> None:
    if device.type == "cpu":
        extension.rows_copy_cpu(call, back, torch.get_num_threads())
    else:
        extension.rows_copy_cuda(call, back, destination(extension, device))


def _call(
    op: str, extension: Any, table: Tensor, grad: Tensor | None, saved: Tensor | None, rows: Tensor | None
) -> Any:
    """What the ops have in common; it keeps no tensor alive."""
    return extension.RowsCall(
        checks.DTYPES[table.dtype],
        checks.address(op, "table", table),
        table.stride(0),
        table.shape[0],
        0 if grad is None else checks.address(op, "grad", grad),
        0 if grad is None else grad.stride(0),
        0 if saved is None else checks.address(op, "saved", saved),
        0 if rows is None else checks.address(op, "rows", rows),
        table.shape[0] if rows is None else rows.shape[0],
        table.shape[1],
    )


def _check_table(op: str, name: str, table: Tensor) -> None:
    checks.dtype_code(op, name, table)
    checks.address(op, name, table)
    if table.dim() != 2:
        raise ValueError(f"{op}: {name} must be a table [V, D], but has shape {tuple(table.shape)}")


def _with_adjacent_elements(table: Tensor) -> Tensor:
    """`table`, or a copy for reading where the elements of a row are apart."""
    return table if table.stride(1) == 1 or table.shape[1] <= 1 else table.contiguous()


def _check_in_place(op: str, table: Tensor) -> None:
    apart = table.shape[0] <= 1 or table.stride(0) >= table.shape[1]
    if not apart or (table.shape[1] > 1 and table.stride(1) != 1):
        raise ValueError(
            f"{op}: the elements of a row of table must be adjacent and rows may not overlap, but the strides are "
            f"{table.stride()}: it is written in place, so work on a contiguous table"
        )


def _check_rows(op: str, rows: Tensor | None, table: Tensor) -> Tensor | None:
    if rows is None:
        return None
    checks.same_device(op, "rows", rows, table.device)
    if rows.dtype != torch.int64:
        raise TypeError(f"{op}: rows must be int64, but is {rows.dtype}")
    if rows.dim() != 1:
        raise ValueError(f"{op}: rows must be one list [R], but has shape {tuple(rows.shape)}")
    return rows.contiguous()


def _check_saved(op: str, saved: Tensor, table: Tensor, rows: Tensor | None) -> None:
    checks.same_device(op, "saved", saved, table.device)
    if saved.dtype != table.dtype:
        raise TypeError(f"{op}: saved must be {table.dtype}, as the table is, but is {saved.dtype}")
    wanted = (table.shape[0] if rows is None else rows.shape[0], table.shape[1])
    if saved.shape != wanted:
        raise ValueError(f"{op}: saved must have shape {wanted}, but has {tuple(saved.shape)}")
    checks.contiguous(op, "saved", saved)


def _check_grad(op: str, grad: Tensor, table: Tensor) -> Tensor:
    checks.same_device(op, "grad", grad, table.device)
    checks.address(op, "grad", grad)
    if grad.dtype != table.dtype:
        raise TypeError(f"{op}: grad must be {table.dtype}, as the table is, but is {grad.dtype}")
    if grad.shape != table.shape:
        raise ValueError(f"{op}: grad must have shape {tuple(table.shape)}, as the table has, not {tuple(grad.shape)}")
    return _with_adjacent_elements(grad)


def _check_skipped(op: str, skipped: Tensor, table: Tensor) -> None:
    checks.same_device(op, "skipped", skipped, table.device)
    if skipped.dtype != torch.int64:
        raise TypeError(f"{op}: skipped must be int64, but is {skipped.dtype}")
    if skipped.dim() != 0:
        raise ValueError(f"{op}: skipped must be 0-d, but has shape {tuple(skipped.shape)}")


def _check_rule(op: str, direction: str, ball: str, group: int) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"{op}: direction must be one of {', '.join(DIRECTIONS)}, not {direction!r}")
    if ball not in BALLS:
        raise ValueError(f"{op}: ball must be one of {', '.join(BALLS)}, not {ball!r}")
    if group not in (0, 1):
        raise ValueError(f"{op}: group must be 0 (all rows together) or 1 (each row), not {group}")
