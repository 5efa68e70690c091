"""divergence on a GPU: one program takes one row, twice.

The first time it finds the largest logits, the sums of e to the power of the others, and the KL divergences that the
gradients need; the second time, from the cache where rows are not very long, the terms of the value and the gradients.
js goes over the row once more in between: its divergences are those from the mean.

A row of an odd number of classes begins anywhere between two multiples of 16 bytes. Its whole tiles begin at the first
such multiple, and are read and written 16 bytes at a time; the edges before and behind them come last, one by one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastadv.arguments import signatures
from fastadv.arguments.kinds import kind_code
from fastadv.kernels.common import folded, launch, power_of_two, wide
from fastadv.kernels.divergence_formulas import gap_of, over_mean, probabilities, terms, times_log
from fastadv.native.launch import fitted

MOST = 1024  # classes of a tile; half as many of float64, which would not fit in registers
TERMS = {torch.float64: 12}  # of the series of second_order; for everything else 6
STAGES = 2  # tiles under way at a time
LOWEST, LOWEST_DOUBLE = tl.constexpr(-3.4028234663852886e38), tl.constexpr(-1.7976931348623157e308)  # that are finite


# A row's tiles


@triton.jit
def ahead_of(n: tl.tensor, classes: tl.tensor, VECTOR: tl.constexpr) -> tl.tensor:
    """The classes of row `n` before the first multiple of `VECTOR` elements in memory."""
    return tl.minimum(((VECTOR - n * classes % VECTOR) % VECTOR).to(tl.int32), classes)


@triton.jit
def whole_at(
    n: tl.tensor,
    stride: tl.tensor,
    ahead: tl.tensor,
    t: tl.tensor,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Where a matrix has the classes of whole tile `t`."""
    return tl.multiple_of(n * stride + ahead, VECTOR) + t * TILE + tl.arange(0, TILE)


@triton.jit
def whole(logits: tl.tensor, at: tl.tensor, counts: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """Logits there: zeros, if the row does not count."""
    return tl.load(logits + at, mask=counts, other=0).to(WIDE)


@triton.jit
def edge_at(e: tl.tensor, ahead: tl.tensor, classes: tl.tensor, TILE: tl.constexpr) -> tl.tensor:
    """The classes beside the whole tiles, from the `e`-th on; some of them are beyond the end."""
    j = e + tl.arange(0, TILE)
    return tl.where(j < ahead, j, j + (classes - ahead) // TILE * TILE)


@triton.jit
def edge(
    logits: tl.tensor, at: tl.tensor, d: tl.tensor, classes: tl.tensor, counts: tl.tensor, WIDE: tl.constexpr
) -> tl.tensor:
    """Logits there, classes `d`: zeros, if the row does not count, and -inf beyond its end."""
    read = tl.where(counts, classes, 0)
    return tl.where(d < classes, tl.load(logits + at, mask=d < read, other=0).to(WIDE), float("-inf"))


# The first pass


@triton.jit
def with_tile(
    a: tl.tensor,
    b: tl.tensor,
    most_a: tl.tensor,
    most_b: tl.tensor,
    sum_x: tl.tensor,
    sum_y: tl.tensor,
    sum_xr: tl.tensor,
    sum_yr: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The largest logits and the sums, rescaled whenever a larger logit turns up, with one tile more."""
    gap = gap_of(a, b)
    higher = tl.maximum(most_a, tl.max(a, axis=0))
    x, keep = tl.exp(a - higher), tl.exp(most_a - higher)
    sum_x, sum_xr, most_a = sum_x * keep + folded(x), sum_xr * keep + folded(times_log(x, gap)), higher
    higher = tl.maximum(most_b, tl.max(b, axis=0))
    y, keep = tl.exp(b - higher), tl.exp(most_b - higher)
    sum_y, sum_yr, most_b = sum_y * keep + folded(y), sum_yr * keep + folded(times_log(y, gap)), higher
    return most_a, most_b, sum_x, sum_y, sum_xr, sum_yr


@triton.jit
def first_pass(
    logits: tl.tensor,
    target: tl.tensor,
    n: tl.tensor,
    logits_stride: tl.tensor,
    target_stride: tl.tensor,
    classes: tl.tensor,
    ahead: tl.tensor,
    counts: tl.tensor,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The largest logits and the sums of e^(logit - largest), of a row and of its target; KL(p|q) and KL(q|p)."""
    lowest: tl.constexpr = LOWEST_DOUBLE if tl.float64 == WIDE else LOWEST  # the distance to it is a number
    most_a, most_b = tl.full([], lowest, WIDE), tl.full([], lowest, WIDE)
    zeros = folded(tl.zeros([TILE], WIDE))
    sum_x, sum_y, sum_xr, sum_yr = zeros, zeros, zeros, zeros
    tiles = (classes - ahead) // TILE
    for t in tl.range(0, tiles, num_stages=STAGES):
        a = whole(logits, whole_at(n, logits_stride, ahead, t, VECTOR, TILE), counts, WIDE)
        b = whole(target, whole_at(n, target_stride, ahead, t, VECTOR, TILE), counts, WIDE)
        most_a, most_b, sum_x, sum_y, sum_xr, sum_yr = with_tile(a, b, most_a, most_b, sum_x, sum_y, sum_xr, sum_yr)
    for e in range(0, classes - tiles * TILE, TILE):
        d = edge_at(e, ahead, classes, TILE)
        a = edge(logits, n * logits_stride + d, d, classes, counts, WIDE)
        b = edge(target, n * target_stride + d, d, classes, counts, WIDE)
        most_a, most_b, sum_x, sum_y, sum_xr, sum_yr = with_tile(a, b, most_a, most_b, sum_x, sum_y, sum_xr, sum_yr)
    x, y = tl.sum(sum_x, axis=0), tl.sum(sum_y, axis=0)
    shift = (most_b - most_a) + (tl.log(y) - tl.log(x))
    return most_a, most_b, x, y, tl.sum(sum_xr, axis=0) / x + shift, -tl.sum(sum_yr, axis=0) / y - shift


# The others


@triton.jit
def against_mean(
    logits: tl.tensor,
    target: tl.tensor,
    n: tl.tensor,
    logits_stride: tl.tensor,
    target_stride: tl.tensor,
    classes: tl.tensor,
    ahead: tl.tensor,
    counts: tl.tensor,
    most_a: tl.tensor,
    most_b: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """KL(p|m) and KL(q|m)."""
    sum_p, sum_q = folded(tl.zeros([TILE], WIDE)), folded(tl.zeros([TILE], WIDE))
    tiles = (classes - ahead) // TILE
    for t in tl.range(0, tiles, num_stages=STAGES):
        a = whole(logits, whole_at(n, logits_stride, ahead, t, VECTOR, TILE), counts, WIDE)
        b = whole(target, whole_at(n, target_stride, ahead, t, VECTOR, TILE), counts, WIDE)
        p, q, r = probabilities(a, b, most_a, most_b, x, y)
        sum_p += folded(times_log(p, over_mean(r)))
        sum_q += folded(times_log(q, over_mean(-r)))
    for e in range(0, classes - tiles * TILE, TILE):
        d = edge_at(e, ahead, classes, TILE)
        a = edge(logits, n * logits_stride + d, d, classes, counts, WIDE)
        b = edge(target, n * target_stride + d, d, classes, counts, WIDE)
        p, q, r = probabilities(a, b, most_a, most_b, x, y)
        sum_p += folded(times_log(p, over_mean(r)))
        sum_q += folded(times_log(q, over_mean(-r)))
    return tl.sum(sum_p, axis=0), tl.sum(sum_q, axis=0)


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
    TERMS: tl.constexpr,
    WIDE: tl.constexpr,
    VECTOR: tl.constexpr,
    STAGES: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One row. One that does not count is read as zeros, and its gradients are zeros."""
    n = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + n)
    counts, ahead = weight != 0, ahead_of(n, classes, VECTOR)
    most_a, most_b, x, y, kl_p, kl_q = 0.0, 0.0, 1.0, 1.0, 0.0, 0.0
    if KIND != "mse":
        most_a, most_b, x, y, kl_p, kl_q = first_pass(
            logits, target, n, logits_stride, target_stride, classes, ahead, counts, WIDE, VECTOR, STAGES, TILE
        )
        weight = tl.where((x > 0) & (y > 0), weight, float("nan"))  # else one of the two has no softmax
    if KIND == "js":
        kl_p, kl_q = against_mean(
            logits, target, n, logits_stride, target_stride, classes, ahead, counts, most_a, most_b, x, y,
            WIDE, VECTOR, STAGES, TILE,
        )  # fmt: skip
    total = folded(tl.zeros([TILE], WIDE))
    tiles = (classes - ahead) // TILE
    for t in tl.range(0, tiles, num_stages=STAGES):
        a = whole(logits, whole_at(n, logits_stride, ahead, t, VECTOR, TILE), counts, WIDE)
        b = whole(target, whole_at(n, target_stride, ahead, t, VECTOR, TILE), counts, WIDE)
        value, left, right = terms(a, b, most_a, most_b, x, y, kl_p, kl_q, classes, KIND, TERMS)
        total += folded(value)
        into = whole_at(n, classes, ahead, t, VECTOR, TILE)
        if FOR_LOGITS:
            tl.store(grad_logits + into, (weight * left).to(logits.dtype.element_ty))
        if FOR_TARGET:
            tl.store(grad_target + into, (weight * right).to(logits.dtype.element_ty))
    for e in range(0, classes - tiles * TILE, TILE):
        d = edge_at(e, ahead, classes, TILE)
        a = edge(logits, n * logits_stride + d, d, classes, counts, WIDE)
        b = edge(target, n * target_stride + d, d, classes, counts, WIDE)
        value, left, right = terms(a, b, most_a, most_b, x, y, kl_p, kl_q, classes, KIND, TERMS)
        total += folded(tl.where(d < classes, value, 0))
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
        TERMS=TERMS.get(logits.dtype, 6),
        WIDE=wide(logits.dtype),
        VECTOR=_vector(logits, target),
        STAGES=STAGES,
        TILE=min(power_of_two(classes), MOST // 2 if logits.dtype == torch.float64 else MOST),
        num_warps=8 if logits.dtype == torch.float32 else 4,  # 16 bytes for each thread, or twice as many
    )
    return values, grad_logits, grad_target


def _vector(logits: Tensor, target: Tensor) -> int:
    """The elements of 16 bytes, if every row of all matrices lies alike towards their multiples; otherwise 1."""
    elements, classes = 16 // logits.element_size(), logits.shape[1]
    alike = all(one.data_ptr() % 16 == 0 and (one.stride(0) - classes) % elements == 0 for one in (logits, target))
    return elements if alike else 1
