r"""One step of a perturbation by moments of its gradient, as torch's optimizers take it, then onto a ball; in place.

.. math::
    m \leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
    \delta \leftarrow \Pi\Big((1 - \alpha \lambda) \delta
    + \frac{\alpha}{1 - \beta_1^t} \frac{m}{\sqrt{v / (1 - \beta_2^t)} + 10^{-8}}\Big)

alpha is `step_size` and t `count`, 1 in the first step of a search. The step goes up: `maximize=True` in torch.optim.

===========  ======  ======  =======  =========================================
direction    beta1   beta2   lambda   of torch.optim
===========  ======  ======  =======  =========================================
``adam``     0.9     0.999   0        Adam
``adamw``    0.9     0.999   0.01     AdamW: the decay shrinks delta
``rmsprop``  none    0.99    0        RMSprop: m is g, and nothing is unbiased
===========  ======  ======  =======  =========================================

`moments` [2, *delta.shape] are m and v (RMSprop: [1, ...], v), float32 (float64 for float64), zero before the first
step. Balls are `ascend`'s but the unit ball, and so are groups, `starts`, `mask` and the lookup. Elsewhere than at
`mask` the gradient is zero, so that what is zero there stays zero, and its moments too. A group whose gradient is not
finite takes no step, keeps its moments, and is counted in `skipped`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastadv import native
from fastadv.arguments import moments as numbers
from fastadv.arguments import signatures
from fastadv.arguments.lookup import Lookup, lookup_of
from fastadv.arguments.moments import Moments
from fastadv.arguments.rule import Rule
from fastadv.arguments.runs import Runs
from fastadv.native.moment_step import moment_step as native_moment_step
from fastadv.ops.ascend import finite, project
from fastadv.ops.dispatch import Backend, Op, in_place, triton
from fastadv.ops.gather_perturb import eager as gather


@torch.no_grad()
def eager(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    moments: Tensor,
    rule: Rule,
    by: Moments,
    lookup: Lookup | None = None,
    starts: Tensor | None = None,
) -> None:
    """The op in plain PyTorch."""
    numbers.check(rule, delta, moments)
    form, tensors = signatures.moment_step(delta, grad, mask, skipped, moments, lookup, starts)
    form.check_shapes(tensors)
    runs = None if starts is None else Runs.begin_at(starts, math.prod(delta.shape[:-1]))
    if delta.numel() > 0:
        _move(delta, grad, mask, skipped, moments, rule, by, runs)
    if lookup is not None:
        lookup.embedded.copy_(gather(lookup.weight, lookup.ids, delta, lookup.slot))


def _move(
    delta: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    skipped: Tensor,
    moments: Tensor,
    rule: Rule,
    by: Moments,
    runs: Runs | None,
) -> None:
    rows = (math.prod(delta.shape[: rule.group if runs is None else -1]), -1)
    g = grad.to(moments.dtype)
    if mask is not None:
        g = g.masked_fill(~mask.unsqueeze(-1), 0)
    g = g.reshape(rows)
    good = finite(g, skipped, runs)
    before, m = delta.reshape(rows).to(moments.dtype), g
    if len(moments) > 1:
        m = _kept(moments[0], good, lambda old: old.lerp(g, 1 - by.first))
    v = _kept(moments[-1], good, lambda old: (old * by.second).addcmul_(g, g, value=1 - by.second))
    moved = (by.keep * before).addcdiv_(m, (v.sqrt() / by.root).add_(by.guard), value=by.rate)
    moved = torch.where(good, moved, before)
    delta.copy_(project(moved, rule.epsilon, rule.ball, "l2", runs).reshape(delta.shape))


def _kept(moment: Tensor, good: Tensor, step: Any) -> Tensor:
    """The next moment, where a group is good; written to where the last one was."""
    old = moment.reshape(len(good), -1)
    new = torch.where(good, step(old), old)
    moment.copy_(new.reshape(moment.shape))
    return new


def unpacked(
    delta: Tensor, grad: Tensor, mask: Tensor | None, skipped: Tensor, moments: Tensor, *flat: Any
) -> tuple[Any, ...]:
    """The schema's flat list as backends take it."""
    rule = Rule._make(flat[:5])
    return delta, grad, mask, skipped, moments, rule, Moments.of(rule, flat[5]), lookup_of(*flat[6:10]), *flat[10:]


OP = Op(
    "moment_step",
    "(Tensor(a!) delta, Tensor grad, Tensor? mask, Tensor(b!) skipped, Tensor(c!) moments, float step_size, "
    "float? epsilon, str direction, str ball, int group, int count, Tensor? weight=None, Tensor? ids=None, "
    "Tensor? slot=None, Tensor(d!)? embedded=None, Tensor? starts=None) -> ()",
    eager=eager,
    fake=in_place,
    backends=[Backend("C++", "cpu", native_moment_step, native.reason), triton("moment_step")],
    unpack=unpacked,
)


def moment_step(
    delta: Tensor,
    grad: Tensor,
    *,
    skipped: Tensor,
    moments: Tensor,
    step_size: float,
    epsilon: float | None,
    direction: str,
    ball: str,
    group: int,
    count: int,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    ids: Tensor | None = None,
    slot: Tensor | None = None,
    embedded: Tensor | None = None,
    starts: Tensor | None = None,
    fused: bool | None = None,
) -> None:
    """Move `delta` one step up, in place, and write `moments` and `embedded`; see the module's formula.

    Raises:
        ValueError: an unknown direction or ball, a count below 1, or what `ascend` refuses.
        TypeError: a dtype that does not fit or that the chosen backend does not serve.
        IndexError: an id or slot out of range (on the CPU).

    Examples:
        >>> delta, skipped = torch.zeros(1, 2), torch.zeros((), dtype=torch.int64)
        >>> rule = {"step_size": 0.5, "epsilon": 1.0, "direction": "adam", "ball": "l2", "group": 1}
        >>> moments = torch.zeros(2, 1, 2)
        >>> moment_step(delta, torch.tensor([[3.0, -4.0]]), skipped=skipped, moments=moments, count=1, **rule)
        >>> delta
        tensor([[ 0.5000, -0.5000]])
    """
    rule, lookup = Rule(step_size, epsilon, direction, ball, group), lookup_of(weight, ids, slot, embedded)
    by = Moments.of(rule, count)
    OP.on(delta, fused)(delta, grad, mask, skipped, moments, rule, by, lookup, starts)
