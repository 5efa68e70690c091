"""The launcher of csrc/ascend: every check, then addresses."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastadv.native import checks

OP = "ascend"
# csrc/ascend.h has the same codes.
DIRECTIONS = {"l2": 0, "sign": 1, "max": 2}
BALLS = {"l2": 0, "linf": 1, "unit": 2, "none": 3}
Rule = tuple[float, float | None, str, str, int]  # step_size, epsilon, direction, ball, group


def ascend(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    slot: Tensor | None = None,
    embedded: Tensor | None = None,
) -> None:
    r"""Move `delta` one step up `grad`, in place, and embed the next forward's words in the same pass.

    .. math::
        \delta \leftarrow \Pi\big(\delta + \text{step} \cdot d(g)\big), \qquad
        embedded_n = round(W[ids_n] + \delta_n) \quad\text{or}\quad round(W[ids_n] + \delta[slot_n])

    `fastadv.ops.ascend` lists the directions and balls. Mutated: `delta`, `skipped` and `embedded`, which share no
    memory with each other or with what is read. The result does not depend on the number of threads.

    Args:
        delta: [..., D], float32 or float64, contiguous.
        grad: the shape of delta in its dtype, or bfloat16 or float16 for a float32 delta; any strides (copied
            unless its rows are evenly spaced and the elements of a row adjacent).
        mask: bool [...]: where there is a gradient; or None.
        skipped: int64, 0-d: grows by the number of groups whose gradient is not finite.
        step_size: the length of the step.
        epsilon: the ball's radius, or None for no ball.
        direction: "l2", "sign" or "max".
        ball: "l2", "linf", "unit" or "none".
        group: how many leading dimensions index the groups.
        weight: None, or the table [V, D] to embed from, float32, bfloat16 or float16 (float64 if delta is); rows
            may be strided, elements of a row may not.
        ids: int64 or int32; with `weight` alone delta is [*ids.shape, D].
        slot: None, or int64 of the shape of `ids`, or flat: which row of delta [R, D] each position takes, -1 for none.
        embedded: [*ids.shape, D] in the weight's dtype, contiguous.

    Raises:
        TypeError: a dtype that is not served, or a tensor without plain memory.
        ValueError: a shape, stride, device, direction or ball that does not fit.
        IndexError: an id outside the table or a slot outside `delta`; nothing has been written then.
        RuntimeError: the extension is not there for this device.

    Example:
        >>> delta, skipped = torch.zeros(1, 2), torch.zeros((), dtype=torch.int64)
        >>> ascend(delta, torch.tensor([[3.0, 4.0]]), None, skipped, 1.0, 0.5, "l2", "l2", 1)
        >>> delta
        tensor([[0.3000, 0.4000]])
    """
    extension = checks.extension_on_cpu(OP, delta)
    check_rule(OP, delta, direction, ball, group)
    check_step(OP, delta, grad, mask, skipped)
    grad, grad_stride = rows_of(OP, grad)
    mask = None if mask is None else mask.contiguous()
    rule = (step_size, epsilon, direction, ball, group)
    call = step_call(OP, extension, delta, grad, grad_stride, mask, skipped, rule)
    if not embeds(OP, delta, weight, ids, slot, embedded):
        extension.ascend_cpu(call, None, torch.get_num_threads())
        increment_version((delta, skipped))
        return
    assert weight is not None and ids is not None and embedded is not None
    ids = checks.indices(OP, "ids", ids)
    slot = None if slot is None else slot.contiguous()
    lookup = lookup_call(OP, extension, delta, weight, ids, slot, embedded)
    extension.ascend_cpu(call, lookup, torch.get_num_threads())
    increment_version((delta, skipped, embedded))


def step_call(
    op: str,
    extension: Any,
    delta: Tensor,
    grad: Tensor,
    grad_stride: int,
    mask: Tensor | None,
    skipped: Tensor,
    rule: Rule,
) -> Any:
    """The call of a step whose arguments were checked; it keeps no tensor alive."""
    step_size, epsilon, direction, ball, group = rule
    return extension.AscendCall(
        checks.DTYPES[grad.dtype],
        checks.address(op, "delta", delta),
        checks.address(op, "grad", grad),
        grad_stride,
        0 if mask is None else checks.address(op, "mask", mask),
        math.prod(delta.shape[:group]),
        math.prod(delta.shape[group:-1]),
        delta.shape[-1],
        step_size,
        0.0 if epsilon is None else epsilon,
        DIRECTIONS[direction],
        BALLS["none" if epsilon is None else ball],
        checks.address(op, "skipped", skipped),
    )


def lookup_call(
    op: str, extension: Any, delta: Tensor, weight: Tensor, ids: Tensor, slot: Tensor | None, embedded: Tensor
) -> Any:
    """gather_perturb's call for the moved delta; it keeps no tensor alive."""
    return extension.GatherPerturbCall(
        checks.DTYPES[weight.dtype],
        checks.address(op, "weight", weight),
        weight.stride(0),
        weight.shape[0],
        checks.address(op, "ids", ids),
        checks.address(op, "delta", delta),
        0 if slot is None else checks.address(op, "slot", slot),
        0 if slot is None else delta.shape[0],
        checks.address(op, "embedded", embedded),
        ids.numel(),
        weight.shape[1],
    )


def rows_of(op: str, grad: Tensor) -> tuple[Tensor, int]:
    """`grad` [..., D], or a copy, with adjacent elements and one distance from row to row; and that distance."""
    if not grad.is_contiguous():
        checks.address(op, "grad", grad)
        stride, reach = 0, None
        for size, step in zip(reversed(grad.shape[:-1]), reversed(grad.stride()[:-1]), strict=True):
            if size == 1:
                continue
            if reach is None:
                stride, reach = step, step
            if step != reach:
                break
            reach *= size
        else:
            if grad.stride(-1) == 1:
                return grad, stride
        grad = grad.contiguous()
    return grad, grad.shape[-1]


def check_rule(op: str, delta: Tensor, direction: str, ball: str, group: int) -> None:
    """Raises ValueError for a direction, ball or group that there is not."""
    if direction not in DIRECTIONS:
        raise ValueError(f"{op}: direction must be one of {', '.join(DIRECTIONS)}, not {direction!r}")
    if ball not in BALLS:
        raise ValueError(f"{op}: ball must be one of {', '.join(BALLS)}, not {ball!r}")
    if not 0 <= group < delta.dim():
        raise ValueError(f"{op}: group must be from 0 to {delta.dim() - 1}, not {group}")


def check_step(op: str, delta: Tensor, grad: Tensor, mask: Tensor | None, skipped: Tensor) -> None:
    """Raises TypeError or ValueError unless delta moves along grad."""
    if delta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: delta must be float32 or float64, but is {delta.dtype}; fused=False takes any")
    checks.contiguous(op, "delta", delta)
    checks.goes_with(op, "grad", grad, delta)
    if grad.shape != delta.shape:
        raise ValueError(f"{op}: grad has shape {tuple(grad.shape)}, delta {tuple(delta.shape)}: they must be equal")
    _same_device(op, "grad", grad, delta)
    if mask is not None:
        _same_device(op, "mask", mask, delta)
        if mask.dtype != torch.bool or mask.shape != delta.shape[:-1]:
            wanted, got = tuple(delta.shape[:-1]), tuple(mask.shape)
            raise ValueError(f"{op}: mask must be bool with shape {wanted}, not {mask.dtype} with shape {got}")
    _same_device(op, "skipped", skipped, delta)
    if skipped.dtype != torch.int64:
        raise TypeError(f"{op}: skipped must be int64, but is {skipped.dtype}")
    if skipped.dim() != 0:
        raise ValueError(f"{op}: skipped must be 0-d, but has shape {tuple(skipped.shape)}")


def embeds(
    op: str, delta: Tensor, weight: Tensor | None, ids: Tensor | None, slot: Tensor | None, embedded: Tensor | None
) -> bool:
    """Whether the next forward's input is wanted, after checking that it can be written.

    Raises:
        TypeError, ValueError: as `ascend` does.
    """
    if weight is None and ids is None and slot is None and embedded is None:
        return False
    if weight is None or ids is None or embedded is None:
        raise ValueError(f"{op}: weight, ids and embedded belong together: give all three, or none of them and no slot")
    check_embedding(op, delta, weight, ids, slot, embedded)
    return True


def check_embedding(op: str, delta: Tensor, weight: Tensor, ids: Tensor, slot: Tensor | None, embedded: Tensor) -> None:
    """Raises TypeError or ValueError unless the ids' rows, moved by delta, go into `embedded`."""
    _check_weight(op, delta, weight)
    shape = (*ids.shape, delta.shape[-1])
    if embedded.dtype != weight.dtype:
        raise TypeError(f"{op}: embedded must be {weight.dtype}, as weight is, but is {embedded.dtype}")
    if embedded.shape != shape:
        raise ValueError(f"{op}: embedded must have shape {shape}, but has {tuple(embedded.shape)}")
    checks.contiguous(op, "embedded", embedded)
    if slot is not None:
        _check_slot(op, delta, ids, slot)
    elif delta.shape != shape:
        raise ValueError(f"{op}: without slot, delta must have shape {shape}, not {tuple(delta.shape)}")
    _same_device(op, "ids", ids, delta)
    _same_device(op, "embedded", embedded, delta)


def _check_weight(op: str, delta: Tensor, weight: Tensor) -> None:
    _same_device(op, "weight", weight, delta)
    checks.goes_with(op, "weight", weight, delta)
    dim = delta.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != dim:
        raise ValueError(f"{op}: weight must be a table [V, {dim}], but has shape {tuple(weight.shape)}")
    checks.adjacent(op, "weight", weight)


def _check_slot(op: str, delta: Tensor, ids: Tensor, slot: Tensor) -> None:
    _same_device(op, "slot", slot, delta)
    if slot.dtype != torch.int64:
        raise TypeError(f"{op}: slot must be int64, but is {slot.dtype}")
    if slot.shape != ids.shape and slot.shape != (ids.numel(),):
        raise ValueError(f"{op}: slot has shape {tuple(slot.shape)}, but ids has {tuple(ids.shape)}")
    if delta.dim() != 2:
        raise ValueError(f"{op}: with slot, delta must be [R, D], but has shape {tuple(delta.shape)}")


def _same_device(op: str, name: str, tensor: Tensor, delta: Tensor) -> None:
    checks.same_device(op, name, tensor, delta.device, "delta")
