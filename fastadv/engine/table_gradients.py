"""The gradient of a plainly looked-up table, kept out of autograd: only the rows that a batch touches are added to.

Autograd would fill a [V, D] tensor with zeros in every full pass, add the batch's rows, and add the whole of it to
`weight.grad`. The gradient of the lookup's result, which the passes compute anyway, is all that is needed: it is summed
over the step's full passes and over equal ids, and goes to `weight.grad` once, at the step's end.
"""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from fastadv.engine.call import Call
from fastadv.engine.embedding import is_plain_lookup
from fastadv.engine.groups import group, ids_of, together
from fastadv.engine.site import Site
from fastadv.engine.zeros import zeros_like
from fastadv.ops import gather_perturb_backward


class TableGradients:
    """Which tables' gradients a step sees to itself, and what it has of them."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.own: dict[int, Tensor] = {}  # by module

    def begin(self, watched: bool) -> None:
        """A new step. `watched`: somebody outside waits for autograd to bring every gradient, so none is taken."""
        modules = [] if watched else self.site.modules
        self.own = {index: cast(Tensor, module.weight) for index, module in enumerate(modules) if _may_own(module)}

    def collect(self, last: bool) -> None:
        """After a full pass: keep the gradients of its lookups, and add them to the tables' in the last."""
        for call in self.site.calls:
            if call.grad is None or call.table is None or self.own.get(call.module) is not call.table:
                continue
            if len(call.held) == 2:  # FreeLB's passes; what is added to has served its ascent
                call.held[0].add_(call.held.pop())
            call.held.append(call.grad)
        if last:
            for index in self.own:
                self._add(index)

    @torch.no_grad()
    def _add(self, index: int) -> None:
        calls = [call for call in self.site.calls if call.module == index and call.held]
        if not calls:
            return
        weight = self.own[index]
        into = weight.grad if _is_plain(weight.grad) else zeros_like(weight)
        gradients = [together([_positions(call, turn) for call in calls]) for turn in range(_turns(calls))]
        alone = len(calls) == len(self.site.calls) and len(self.site.modules) == 1
        groups = self.site.grouped() if alone else group(calls, self.site.modules, self.site.fused)
        ids = together([ids_of(call) for call in calls])
        padding = cast("int | None", self.site.modules[index].padding_idx)
        gather_perturb_backward(into, gradients, ids, groups, padding_idx=padding, fused=self.site.fused)
        if into is not weight.grad:  # there was none, or another use of the table has brought a sparse one
            weight.grad = into if weight.grad is None else into + weight.grad
        for call in calls:
            call.held.clear()


def _turns(calls: list[Call]) -> int:
    return max(len(call.held) for call in calls)


def _positions(call: Call, turn: int) -> Tensor:
    """[N, D]: the gradient of one full pass."""
    grad = call.held[turn] if turn < len(call.held) else torch.zeros_like(call.held[0])
    return grad.reshape(-1, grad.shape[-1])


def _may_own(module: nn.Module) -> bool:
    """Whether nobody can tell who adds to the table's gradient: a plain leaf without hooks, and a plain gradient."""
    weight = module.weight if is_plain_lookup(module) else None
    if not isinstance(weight, Tensor) or not weight.requires_grad or not weight.is_leaf:
        return False
    if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
        return False
    return weight.grad is None or _is_plain(weight.grad)


def _is_plain(grad: Tensor | None) -> TypeGuard[Tensor]:
    return type(grad) is Tensor and grad.layout == torch.strided and grad.is_contiguous()
