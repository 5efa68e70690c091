"""divergence on a GPU: one program takes one row, twice.

The first time it finds the largest logits, the sums of e to the power of the others, and the KL divergences that the
gradients need; the second time, from the cache where rows are not very long, the terms of the value and the gradients.
js goes over the row once more in between: its divergences are those from the mean.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.arguments import signatures
from fastadv.arguments.kinds import kind_code
from fastadv.kernels.common import launch, wide
from fastadv.native.launch import fitted

MOST = 1024  # classes of a tile; half as many of float64, which would not fit in registers
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3e38)  # finite, so that the distance to it is a number


@triton.jit
def times_log(p: tl.tensor, log: tl.tensor) -> tl.tensor:
    """P log, and zero where p is zero and the logarithm infinite."""
    return tl.where(p == 0, 0, p * log)


@triton.jit
def second_order(r: tl.tensor) -> tl.tensor:
    """(e^r - 1 - r) / r^2 for |r| < 1/4: its series, 1/2 (1 + r/3 (1 + r/4 (1 + ...)))."""
    series = r * 0 + 1
    for k in tl.static_range(12):
        series = 1 + r * series * (1 / (14 - k))
    return 0.5 * series


@triton.jit
def over_mean(r: tl.tensor) -> tl.tensor:
    """Log p - log m by r = log p - log q: ln 2 - log(1 + e^-r)."""
    return LN2 + tl.where(r < 0, r, 0) - tl.log(1 + tl.exp(-tl.abs(r)))


@triton.jit
def tile(
    row: tl.tensor,
    d: tl.tensor,
    classes: tl.tensor,
    read: tl.tensor,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Logits `d` of a row: zeros from `read` on, and -inf beyond its end."""
    return tl.where(d < classes, tl.load(row + d, mask=d < read, other=0).to(WIDE), float("-inf"))


@triton.jit
def gap_of(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """A - b, and zero where both are infinite."""
    return tl.where(a == b, 0, a - b)


@triton.jit
def first_pass(
    a_row: tl.tensor,
    b_row: tl.tensor,
    classes: tl.tensor,
    read: tl.tensor,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The largest logits and the sums of e^(logit - largest), of a row and of its target; KL(p|q) and KL(q|p)."""
    most_a = tl.full([], LOWEST, WIDE)
    most_b = tl.full([], LOWEST, WIDE)
    sum_x, sum_y = tl.zeros([TILE], WIDE), tl.zeros([TILE], WIDE)
    sum_xr, sum_yr = tl.zeros([TILE], WIDE), tl.zeros([TILE], WIDE)
    for first in range(0, classes, TILE):
        d = first + tl.arange(0, TILE)
        a, b = tile(a_row, d, classes, read, WIDE), tile(b_row, d, classes, read, WIDE)
        gap = gap_of(a, b)
        higher = tl.maximum(most_a, tl.max(a, axis=0))
        x, keep = tl.exp(a - higher), tl.exp(most_a - higher)
        sum_x, sum_xr, most_a = sum_x * keep + x, sum_xr * keep + times_log(x, gap), higher
        higher = tl.maximum(most_b, tl.max(b, axis=0))
        y, keep = tl.exp(b - higher), tl.exp(most_b - higher)
        sum_y, sum_yr, most_b = sum_y * keep + y, sum_yr * keep + times_log(y, gap), higher
    x, y = tl.sum(sum_x, axis=0), tl.sum(sum_y, axis=0)
    shift = (most_b - most_a) + (tl.log(y) - tl.log(x))
    return most_a, most_b, x, y, tl.sum(sum_xr, axis=0) / x + shift, -tl.sum(sum_yr, axis=0) / y - shift


@triton.jit
def at(
    a: tl.tensor, b: tl.tensor, most_a: tl.tensor, most_b: tl.tensor, x: tl.tensor, y: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """p, q and r = log p - log q."""
    shift = (most_b - most_a) + (tl.log(y) - tl.log(x))
    return tl.exp(a - most_a) / x, tl.exp(b - most_b) / y, gap_of(a, b) + shift


@triton.jit
def against_mean(
    a_row: tl.tensor,
    b_row: tl.tensor,
    classes: tl.tensor,
    read: tl.tensor,
    most_a: tl.tensor,
    most_b: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """KL(p|m) and KL(q|m)."""
    sum_p, sum_q = tl.zeros([TILE], WIDE), tl.zeros([TILE], WIDE)
    for first in range(0, classes, TILE):
        d = first + tl.arange(0, TILE)
        a, b = tile(a_row, d, classes, read, WIDE), tile(b_row, d, classes, read, WIDE)
        p, q, r = at(a, b, most_a, most_b, x, y)
        sum_p += times_log(p, over_mean(r))
        sum_q += times_log(q, over_mean(-r))
    return tl.sum(sum_p, axis=0), tl.sum(sum_q, axis=0)


@triton.jit
def terms(
    p: tl.tensor, q: tl.tensor, r: tl.tensor, kl_p: tl.tensor, kl_q: tl.tensor, KIND: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Each class's part of the value, and its gradients: the formulas of csrc/divergence.h."""
    if KIND == "js":
        u, v = over_mean(r), over_mean(-r)
        value = 0.5 * (times_log(p, u) + times_log(q, v))
        return value, 0.5 * times_log(p, u - kl_p), 0.5 * times_log(q, v - kl_q)
    close = tl.abs(r) < 0.25
    small = r * r * second_order(r)
    difference = tl.where(close, q * (r + small), p - q)
    from_target = times_log(q, -r - kl_q)
    if KIND == "kl":
        return tl.where(close, q * small, p - q - times_log(q, r)), difference, from_target
    value = tl.where(difference == 0, 0, difference * r)
    return value, times_log(p, r - kl_p) + difference, from_target - difference


@triton.jit
def divergence_kernel(
    logits: tl.tensor,
    target: tl.tensor,
    weights: tl.tensor,
    values: tl.tensor,
    grad_logits: tl.tensor,
    grad_target: tl.tensor,
    logits_stride: tl.tensor,
    target_stride: tl.tensor,
    classes: tl.tensor,
    KIND: tl.constexpr,
    FOR_LOGITS: tl.constexpr,
    FOR_TARGET: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One row. One that does not count is read as zeros, and its gradients are zeros."""
    n = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + n)
    read = tl.where(weight != 0, classes, 0)
    a_row, b_row = logits + n * logits_stride, target + n * target_stride
    if KIND != "mse":
        most_a, most_b, x, y, kl_p, kl_q = first_pass(a_row, b_row, classes, read, WIDE, TILE)
        if KIND == "js":
            kl_p, kl_q = against_mean(a_row, b_row, classes, read, most_a, most_b, x, y, WIDE, TILE)
    total = tl.zeros([TILE], WIDE)
    for first in range(0, classes, TILE):
        d = first + tl.arange(0, TILE)
        a, b = tile(a_row, d, classes, read, WIDE), tile(b_row, d, classes, read, WIDE)
        if KIND == "mse":
            gap = gap_of(a, b)
            left = 2 * gap / classes
            value, right = gap * gap / classes, -left
        else:
            p, q, r = at(a, b, most_a, most_b, x, y)
            value, left, right = terms(p, q, r, kl_p, kl_q, KIND)
        total += tl.where(d < classes, value, 0)
        if FOR_LOGITS:
            tl.store(grad_logits + n * classes + d, weight * left, mask=d < classes)
        if FOR_TARGET:
            tl.store(grad_target + n * classes + d, weight * right, mask=d < classes)
    tl.store(values + n, weight * tl.sum(total, axis=0))


def divergence(
    logits: Tensor, target: Tensor, weights: Tensor, kind: str, for_logits: bool, for_target: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastadv.ops.divergence`; `fastadv.arguments.signatures` lists the tensors."""
    kind_code(kind)
    logits, target, weights = fitted(signatures.DIVERGENCE, (logits, target, weights))
    values = torch.empty_like(weights)
    grad_logits, grad_target = (logits.new_empty(logits.shape if wants else (0,)) for wants in (for_logits, for_target))
    count, classes = logits.shape
    if count == 0:
        return values, grad_logits, grad_target
    launch(
        divergence_kernel,
        (count,),
        logits.device,
        logits,
        target,
        weights,
        values,
        grad_logits if for_logits else logits,
        grad_target if for_target else target,
        logits.stride(0),
        target.stride(0),
        classes,
        KIND=kind,
        FOR_LOGITS=for_logits,
        FOR_TARGET=for_target,
        WIDE=wide(logits.dtype),
        TILE=min(triton.next_power_of_2(classes), MOST // 2 if logits.dtype == torch.float64 else MOST),
    )
    return values, grad_logits, grad_target
