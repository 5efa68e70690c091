"""Shared by the passes of divergence: its formulas, class by class, as csrc/divergence.h has them."""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def times_log(p: tl.tensor, log: tl.tensor) -> tl.tensor:
    """P log, and zero where p is zero and the logarithm infinite."""
    return tl.where(p == 0, 0, p * log)


@triton.jit
def second_order(r: tl.tensor, TERMS: tl.constexpr) -> tl.tensor:
    """(e^r - 1 - r) / r^2 for |r| < 1/4: its series, 1/2 (1 + r/3 (1 + r/4 (1 + ...)))."""
    series = r * 0 + 1
    for k in tl.static_range(TERMS):
        series = 1 + r * series * (1 / (TERMS + 2 - k))
    return 0.5 * series


@triton.jit
def over_mean(r: tl.tensor) -> tl.tensor:
    """Log p - log m by r = log p - log q: ln 2 - log(1 + e^-r)."""
    return LN2 + tl.where(r < 0, r, 0) - tl.log(1 + tl.exp(-tl.abs(r)))


@triton.jit
def gap_of(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """A - b, and zero where both are infinite."""
    return tl.where(a == b, 0, a - b)


@triton.jit
def probabilities(
    a: tl.tensor, b: tl.tensor, most_a: tl.tensor, most_b: tl.tensor, x: tl.tensor, y: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """p, q and r = log p - log q."""
    shift = (most_b - most_a) + (tl.log(y) - tl.log(x))
    return tl.exp(a - most_a) * (1 / x), tl.exp(b - most_b) * (1 / y), gap_of(a, b) + shift


@triton.jit
def terms(
    a: tl.tensor,
    b: tl.tensor,
    most_a: tl.tensor,
    most_b: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    kl_p: tl.tensor,
    kl_q: tl.tensor,
    classes: tl.tensor,
    KIND: tl.constexpr,
    TERMS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Each class's part of the value, and its gradients: the formulas of csrc/divergence.h."""
    if KIND == "mse":
        gap = gap_of(a, b)
        left = 2 * gap / classes
        return gap * gap / classes, left, -left
    p, q, r = probabilities(a, b, most_a, most_b, x, y)
    if KIND == "js":
        u, v = over_mean(r), over_mean(-r)
        value = 0.5 * (times_log(p, u) + times_log(q, v))
        return value, 0.5 * times_log(p, u - kl_p), 0.5 * times_log(q, v - kl_q)
    close = tl.abs(r) < 0.25
    small = r * r * second_order(r, TERMS)
    difference = tl.where(close, q * (r + small), p - q)
    from_target = times_log(q, -r - kl_q)
    if KIND == "kl":
        return tl.where(close, q * small, p - q - times_log(q, r)), difference, from_target
    value = tl.where(difference == 0, 0, difference * r)
    return value, times_log(p, r - kl_p) + difference, from_target - difference
