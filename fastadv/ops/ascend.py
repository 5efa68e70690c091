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
gradient is not finite takes no step and is counted in `skipped` (int64, 0-d). Nothing waits for the device.

With `starts` [G + 1] the groups are runs of positions instead, as documents lie in packed rows: group g is positions
`starts[g]` to `starts[g + 1]`, counted through [...], and `group` is not looked at.

With `weight`, `ids` and `embedded`, the same call writes the next forward's input: gather_perturb's W[ids] + delta, or
W[ids] + delta[slot] with nothing added where slot is -1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup, lookup_of
from fastadv.arguments.rule import Rule
from fastadv.arguments.runs import Runs
from fastadv.native.ascend import ascend as native_ascend
from fastadv.ops.dispatch import Backend, Op, in_place, triton
from fastadv.ops.gather_perturb import eager as gather


@torch.no_grad()
def eager(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    rule: Rule,
    lookup: Lookup | None = None,
    starts: Tensor | None = None,
) -> None:
    """The op in plain PyTorch."""
    rule.check("ascend", delta.dim())
    form, tensors = signatures.ascend(delta, grad, mask, skipped, lookup, starts)
    form.check_shapes(tensors)
    runs = None if starts is None else Runs.begin_at(starts, math.prod(delta.shape[:-1]))
    if delta.numel() > 0:
        _move(delta, grad, mask, skipped, rule, runs)
    if lookup is not None:
        lookup.embedded.copy_(gather(lookup.weight, lookup.ids, delta, lookup.slot))


def _move(delta: Tensor, grad: Tensor, mask: Tensor | None, skipped: Tensor, rule: Rule, runs: Runs | None) -> None:
    step_size, epsilon, direction, ball, group = rule
    wide = torch.promote_types(delta.dtype, torch.float32)
    g = grad.to(wide)
    if mask is not None:
        g = g.masked_fill(~mask.unsqueeze(-1), 0)
    rows = (math.prod(delta.shape[: group if runs is None else -1]), -1)
    g = g.reshape(rows)
    g = torch.where(finite(g, skipped, runs), g, 0)
    step = step_size * g.sign() if direction == "sign" else with_norm(g, step_size, direction, runs)
    moved = delta.reshape(rows).to(wide) + step
    delta.copy_(project(moved, epsilon, ball, direction, runs).reshape(delta.shape))


def finite(g: Tensor, skipped: Tensor, runs: Runs | None) -> Tensor:
    """Whether each row's group is finite: [rows, 1]; counts the groups that are not."""
    good = g.isfinite().all(dim=1, keepdim=True)
    if runs is None:
        skipped += (~good).sum()
        return good
    bad = runs.each((~good).to(g.dtype).flatten(), "max")
    skipped += bad.sum().long()
    return (bad == 0)[runs.of].unsqueeze(1)


def project(moved: Tensor, epsilon: float | None, ball: str, direction: str, runs: Runs | None = None) -> Tensor:
    """Each row of `moved`, brought onto the ball."""
    if epsilon is None or ball == "none":
        return moved
    if ball == "linf":
        return moved.clamp(-epsilon, epsilon)
    if ball == "unit":
        return with_norm(moved, epsilon, direction, runs)
    return torch.where(l2_norm(moved, runs) > epsilon, with_norm(moved, epsilon, "l2", runs), moved)


# Rows [N, n] are a group each, or with `runs` parts of longer ones: then what is said of a row is said of its group.


def with_norm(x: Tensor, length: float, kind: str, runs: Runs | None = None) -> Tensor:
    """Each row of `x` brought to `length`, in the l2 norm or in the largest magnitude; a zero row stays zero."""
    x = x / _scale(x, runs)
    norm = _plain_norm(x, runs) if kind == "l2" else largest(x, runs)
    return length * x / torch.where(norm > 0, norm, 1)


def l2_norm(x: Tensor, runs: Runs | None = None) -> Tensor:
    """The l2 norm of each row of `x`: [N, 1]."""
    scale = _scale(x, runs)
    return scale * _plain_norm(x / scale, runs)


def largest(x: Tensor, runs: Runs | None = None) -> Tensor:
    """The largest magnitude of each row: [N, 1]."""
    found = x.abs().amax(dim=1, keepdim=True)
    return found if runs is None else runs.spread(found.flatten(), "max").unsqueeze(1)


def _scale(x: Tensor, runs: Runs | None) -> Tensor:
    """A power of two near each row's largest magnitude: squares of x / scale neither overflow nor vanish.

    Dividing by a power of two is exact, so that where the plain formula is safe, this is the plain formula bit for bit.
    """
    most = largest(x, runs)
    return torch.ldexp(torch.ones_like(most), most.frexp().exponent - 1)


def _plain_norm(x: Tensor, runs: Runs | None) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm if runs is None else runs.spread(norm.square().flatten(), "sum").sqrt().unsqueeze(1)


def unpacked(delta: Tensor, grad: Tensor, mask: Tensor | None, skipped: Tensor, *flat: Any) -> tuple[Any, ...]:
    """The schema's flat list as backends take it."""
    return delta, grad, mask, skipped, Rule._make(flat[:5]), lookup_of(*flat[5:9]), *flat[9:]


OP = Op(
    "ascend",
    "(Tensor(a!) delta, Tensor grad, Tensor? mask, Tensor(b!) skipped, float step_size, float? epsilon, "
    "str direction, str ball, int group, "
    "Tensor? weight=None, Tensor? ids=None, Tensor? slot=None, Tensor(c!)? embedded=None, Tensor? starts=None) -> ()",
    eager=eager,
    fake=in_place,
    backends=[Backend("C++", "cpu", native_ascend, native.reason), triton("ascend")],
    unpack=unpacked,
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
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    slot: Tensor | None = None,
    embedded: Tensor | None = None,
    starts: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """Move `delta` one step up `grad`, in place, and write `embedded`; see the module's formula.

    The eager version takes any strides and any floating dtype; `fastadv.arguments.signatures` says what the others
    take.

    Raises:
        ValueError: an unknown direction or ball, shapes or strides that do not fit, a mask that is not bool, or starts
            that do not rise from 0 to the number of positions (on the CPU).
        TypeError: a dtype that does not fit or that the chosen backend does not serve.
        IndexError: an id or slot out of range (on the CPU).

    Examples:
        >>> delta, skipped = torch.zeros(1, 2), torch.zeros((), dtype=torch.int64)
        >>> grad = torch.tensor([[3.0, 4.0]])
        >>> ascend(delta, grad, skipped=skipped, step_size=0.5, epsilon=1.0, direction="l2", ball="l2", group=1)
        >>> delta
        tensor([[0.3000, 0.4000]])
    """
    rule, lookup = Rule(step_size, epsilon, direction, ball, group), lookup_of(weight, ids, slot, embedded)
    OP.on(delta, fused)(delta, grad, mask, skipped, rule, lookup, starts)
