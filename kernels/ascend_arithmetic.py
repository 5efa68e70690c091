"""Shared by the kernels of ascend: a group's arithmetic, in float64, a tile of the gradient, and the skip counter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def direction_of(g: tl.tensor, DIRECTION: tl.constexpr) -> tl.tensor:
    """u: the direction, before it is brought to length; NaN where g is not finite."""
    if DIRECTION == "sign":
        return (g > 0).to(tl.float64) - (g < 0).to(tl.float64) + (g - g)
    return g


@triton.jit
def factor(uu: tl.tensor, largest: tl.tensor, step: tl.tensor, DIRECTION: tl.constexpr) -> tl.tensor:
    """a: what u is multiplied with; 0 where there is no gradient, or one that is not finite."""
    size = uu * 0 + 1
    if DIRECTION == "l2":
        size = tl.sqrt(uu)
    if DIRECTION == "max":
        size = largest
    good = (uu > 0) & (uu < float("inf"))
    return tl.where(good, step / tl.where(good, size, 1), 0)


@triton.jit
def shrink(size: tl.tensor, epsilon: tl.tensor, BALL: tl.constexpr) -> tl.tensor:
    """The factor that brings a perturbation of this size onto the ball."""
    if BALL == "unit":
        return tl.where(size > 0, epsilon / tl.where(size > 0, size, 1), 1)
    return tl.where(size > epsilon, epsilon / tl.where(size > 0, size, 1), 1)


@triton.jit
def moved_by(delta: tl.tensor, u: tl.tensor, a: tl.tensor) -> tl.tensor:
    """Delta + a u; where there is no step, delta, whatever u is."""
    return tl.where(a != 0, delta + a * u, delta)


@triton.jit
def brought_onto(moved: tl.tensor, by: tl.tensor, epsilon: tl.tensor, BALL: tl.constexpr) -> tl.tensor:
    """The moved perturbation, projected."""
    if BALL == "none":
        return moved
    if BALL == "linf":
        return tl.where(moved > epsilon, epsilon, tl.where(moved < -epsilon, -epsilon, moved))
    return moved * by


@triton.jit
def gradient(
    grad: tl.tensor,
    mask: tl.tensor,
    n: tl.tensor,
    d: tl.tensor,
    there: tl.tensor,
    inside: tl.tensor,
    stride: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """A tile of the gradient; zero where the mask says that nothing is."""
    live = inside
    if MASKED:
        live = inside & tl.load(mask + n, mask=there, other=0).to(tl.int1)[:, None]
    return tl.load(grad + n[:, None] * stride + d[None, :], mask=live, other=0).to(tl.float64)


@triton.jit
def count_skipped(skipped: tl.tensor, groups: tl.tensor) -> None:
    """Whole numbers add up to the same in any order: this may be atomic."""
    tl.atomic_add(skipped, groups, mask=groups > 0)
