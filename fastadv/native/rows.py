"""The launchers of csrc/rows.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv import native
from fastadv.arguments import signatures
from fastadv.arguments.rule import Rule
from fastadv.native.flags import destination
from fastadv.native.launch import Launch


def check_step(rule: Rule, saved: Tensor | None) -> None:
    """Raises ValueError for a rule that there is not, or a ball around nothing."""
    rule.check("rows_step", 2)
    if rule.bounded and saved is None:
        raise ValueError(f"rows_step: ball={rule.ball!r} is around the rows as they were: saved cannot be None")


def _check_step(tensors: Sequence[Tensor | None], rule: Rule, where: Any) -> None:
    del where
    check_step(rule, tensors[-1])


_TOUCHED = Launch("rows_touched_cpu", signatures.ROWS_TOUCHED)
_BACK_UP = Launch("rows_back_up", signatures.ROWS_BACK_UP)
_RESTORE = Launch("rows_restore", signatures.ROWS_RESTORE)
_RESTORE_SOME = Launch("rows_restore", signatures.SOME_ROWS_RESTORE)
_STEP = Launch("rows_step", signatures.ROWS_STEP, _check_step)
_STEP_SOME = Launch("rows_step", signatures.SOME_ROWS_STEP, _check_step)


def _where(table: Tensor) -> Any:
    """The target of a launch; None on the CPU."""
    return destination(native.extension(), table.device) if table.is_cuda and native.cuda_reason() is None else None


def rows_touched(table: Tensor) -> Tensor:
    """The rows of `table` that hold anything but zero (NaN is something, -0.0 is not): int64, ascending.

    One read of the table; a row that holds something is left at its first find.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: it is not a table.
        RuntimeError: the extension is not there, or the table is not on the CPU.

    Examples:
        >>> rows_touched(torch.tensor([[0.0, -0.0], [0.0, 2.0], [float("nan"), 0.0]]))
        tensor([1, 2])
    """
    found, count = _TOUCHED((table,))
    rows: Tensor = found[:count].clone()
    return rows


def rows_back_up(table: Tensor, rows: Tensor | None) -> Tensor:
    """A copy of `rows` of the table (strictly ascending; None: every row), bit for bit.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape or device that does not fit, or rows out of order.
        IndexError: a row outside the table; nothing has been read then. (On CUDA it is left out, and `flags.check`
            raises.)
        RuntimeError: the extension is not there for this device.

    Examples:
        >>> rows_back_up(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1]))
        tensor([[3., 4.]])
    """
    saved: Tensor = _BACK_UP((table, rows), _where(table))
    return saved


def rows_restore(table: Tensor, saved: Tensor, rows: Tensor | None) -> None:
    """Put the copies back, bit for bit: row r of `saved` where `rows` says. Mutated: `table`.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride or device that does not fit, or rows out of order.
        IndexError: a row outside the table; nothing has been written then. (On CUDA: as in `rows_back_up`.)
        RuntimeError: the extension is not there for this device.

    Examples:
        >>> table = torch.zeros(2, 2)
        >>> rows_restore(table, torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
        >>> table
        tensor([[0., 0.],
                [3., 4.]])
    """
    if rows is None:
        _RESTORE((table, saved), _where(table))
    else:
        _RESTORE_SOME((table, rows, saved), _where(table))
    increment_version((table,))


def rows_step(
    table: Tensor, grad: Tensor, saved: Tensor | None, rows: Tensor | None, skipped: Tensor, rule: Rule
) -> None:
    r"""Move rows of the table one step up their gradient, and back onto the ball around their copies, in place.

    .. math:: W_n \leftarrow S_n + \Pi\big(W_n - S_n + \text{step} \cdot d(g_n)\big)

    `fastadv.ops.ascend` lists the directions d and balls. `saved` has the rows at the centre of the ball, in the order
    of `rows` (strictly ascending; None: every row), and is not read without a ball. Mutated: `table` and `skipped`,
    which share no memory with each other or with what is read. The result does not depend on the number of threads.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride, device, direction or ball that does not fit, or rows out of order.
        IndexError: a row outside the table; nothing has been written then. (On CUDA: as in `rows_back_up`.)
        RuntimeError: the extension is not there for this device.

    Examples:
        >>> table, skipped = torch.ones(3, 2), torch.zeros((), dtype=torch.int64)
        >>> grad, rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), torch.tensor([1])
        >>> rows_step(table, grad, None, rows, skipped, Rule(0.5, None, "l2", "none", 0))
        >>> table
        tensor([[1.0000, 1.0000],
                [1.3000, 1.4000],
                [1.0000, 1.0000]])
    """
    saved = saved if rule.bounded else None
    if rows is None:
        _STEP((table, grad, skipped, saved), rule, _where(table))
    else:
        _STEP_SOME((table, grad, skipped, rows, saved), rule, _where(table))
    increment_version((table, skipped))
