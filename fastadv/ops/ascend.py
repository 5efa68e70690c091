r"""One step of ascent on a perturbation: normalise, step, project, in place.

.. math:: \delta \leftarrow \Pi\big(\delta + \text{step} \cdot d(g)\big)

=========  ==============================   =========  ===============================================
direction  d(g), per group                  ball       projection, per group
=========  ==============================   =========  ===============================================
``l2``     g / ||g||_2                      ``l2``     onto ||delta||_2 <= epsilon
``sign``   sign(g)                          ``linf``   onto |delta_i| <= epsilon
``max``    g / max|g|                       ``unit``   onto the sphere of radius epsilon (the l2 norm,
..                                          ..         or the largest element for sign and max)
..                                          ``none``   stays where it is
=========  ==============================   =========  ===============================================

`delta` and `grad` have the same shape [..., D]; the first `group` dimensions index the groups (0: all is one group).
`mask` [...] marks what exists: elsewhere there is no gradient. Reductions are in float32 (float64 for float64), and
scaled, so that gradients of 1e30 and 1e-30 give right directions. A group without a gradient takes no step; one whose
gradient is not finite takes no step and is counted in `skipped` (int64, 0-d). All is on the device; nothing waits for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastadv.ops.dispatch import Op

DIRECTIONS = ("l2", "sign", "max")
BALLS = ("l2", "linf", "unit", "none")


def eager(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
) -> None:
    """The op in plain PyTorch."""
    if delta.numel() == 0:
        return
    wide = torch.promote_types(delta.dtype, torch.float32)
    g = grad.to(wide)
    if mask is not None:
        g = g.masked_fill(~mask.unsqueeze(-1), 0)
    groups = (math.prod(delta.shape[:group]), -1)
    g = g.reshape(groups)
    finite = g.isfinite().all(dim=1, keepdim=True)
    skipped += (~finite).sum()
    g = torch.where(finite, g, 0)
    moved = delta.reshape(groups).to(wide) + step_size * _direct(g, direction)
    delta.copy_(_project(moved, epsilon, ball, direction).reshape(delta.shape))


def _direct(g: Tensor, direction: str) -> Tensor:
    """The direction of each row of `g`; zero where the row is zero."""
    if direction == "sign":
        return g.sign()
    unit = g / _or_one(_largest(g))
    if direction == "max":
        return unit
    return unit / _or_one(torch.linalg.vector_norm(unit, dim=1, keepdim=True))


def _project(moved: Tensor, epsilon: float | None, ball: str, direction: str) -> Tensor:
    """Each row of `moved`, brought onto the ball."""
    if epsilon is None or ball == "none":
        return moved
    if ball == "linf":
        return moved.clamp(-epsilon, epsilon)
    if ball == "unit":
        return epsilon * _direct(moved, "l2" if direction == "l2" else "max")
    norm = l2_norm(moved)
    return torch.where(norm > epsilon, moved * (epsilon / norm), moved)


def l2_norm(x: Tensor) -> Tensor:
    """The l2 norm of each row of `x` [G, n] -> [G, 1], scaled so that squares neither overflow nor vanish."""
    scale = _or_one(_largest(x))
    return scale * torch.linalg.vector_norm(x / scale, dim=1, keepdim=True)


def _largest(x: Tensor) -> Tensor:
    """The largest magnitude of each row."""
    return x.abs().amax(dim=1, keepdim=True)


def _or_one(x: Tensor) -> Tensor:
    """A divisor: `x`, or one where it is zero."""
    return torch.where(x > 0, x, 1)


def fake(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
) -> None:
    """In place: nothing to say about shapes."""


OP = Op(
    "ascend",
    "(Tensor(a!) delta, Tensor grad, Tensor? mask, Tensor(b!) skipped, float step_size, float? epsilon, "
    "str direction, str ball, int group) -> ()",
    eager=eager,
    fake=fake,
)


def ascend(
    delta: Tensor,
    grad: Tensor,
    *,
    skipped: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
    mask: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """Move `delta` one step up `grad`, in place; see the module's formula.

    Raises:
        ValueError: an unknown direction or ball, shapes that do not fit, or a mask that is not bool.
    """
    _check(delta, grad, mask, direction, ball, group)
    run = OP.choose(delta.device.type, fused)
    with torch.no_grad():
        run(delta, grad, mask, skipped, step_size, epsilon, direction, ball, group)


def _check(delta: Tensor, grad: Tensor, mask: Tensor | None, direction: str, ball: str, group: int) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, not {direction!r}")
    if ball not in BALLS:
        raise ValueError(f"ball must be one of {', '.join(BALLS)}, not {ball!r}")
    if grad.shape != delta.shape:
        raise ValueError(f"grad has shape {tuple(grad.shape)}, delta {tuple(delta.shape)}: they must be equal")
    if not 0 <= group < delta.ndim:
        raise ValueError(f"group must be from 0 to {delta.ndim - 1}, not {group}")
    if mask is not None and (mask.shape != delta.shape[:-1] or mask.dtype != torch.bool):
        wanted, got = tuple(delta.shape[:-1]), tuple(mask.shape)
        raise ValueError(f"mask must be bool with shape {wanted}, not {mask.dtype} with shape {got}")
