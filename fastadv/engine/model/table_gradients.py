"""The gradient of a plainly looked-up table, kept out of autograd: only the rows that a batch touches are added to.

Autograd would fill a [V, D] tensor with zeros in every full pass, add the batch's rows, and add the whole of it to
`weight.grad`. The gradient of the lookup's result, which the passes compute anyway, is all that is needed: it is summed
over the step's full passes and over equal ids, and goes to `weight.grad` once, at the step's end.
"""

from __future__ import annotations

from typing import TypeGuard, cast

import torch
from torch import Tensor, nn

from fastadv.engine.lookup import Lookup
from fastadv.engine.lookups import Lookups
from fastadv.engine.model.find import is_plain_lookup
from fastadv.engine.model.lazy_zeros import zeros_like
from fastadv.engine.perturb.segments import group, ids_of, together
from fastadv.ops import gather_perturb_backward


class TableGradients:
    """One step's: which tables' gradients it sees to itself, and what it has of them.

    Args:
        lookups: the step's.
        watched: somebody outside waits for autograd to bring every gradient, so none is taken from it.
    """

    def __init__(self, lookups: Lookups, *, watched: bool) -> None:
        self.lookups = lookups
        self.modules = lookups.places.modules
        mine = [] if watched else self.modules
        self._own = {index: cast(Tensor, module.weight) for index, module in enumerate(mine) if _may_own(module)}

    def owns(self, module: int, table: Tensor) -> bool:
        """Whether autograd need not compute the gradient of lookups in `table`, the weight of that module."""
        return self._own.get(module) is table

    def collect(self) -> None:
        """After a full pass: keep the gradients of its lookups."""
        for lookup in self.lookups:
            if lookup.grad is None or lookup.table is None or not self.owns(lookup.module, lookup.table):
                continue
            kept = lookup.full_grads
            if len(kept) == 2:  # FreeLB's passes; an ascent has consumed the one that is added to
                kept[0].add_(kept.pop())
            kept.append(lookup.grad)

    def flush(self) -> None:
        """At the step's end: add them to the tables' gradients."""
        for index in self._own:
            self._add(index)

    @torch.no_grad()
    def _add(self, index: int) -> None:
        lookups = [lookup for lookup in self.lookups if lookup.module == index and lookup.full_grads]
        if not lookups:
            return
        weight, fused = self._own[index], self.lookups.places.fused
        into = weight.grad if _is_plain(weight.grad) else zeros_like(weight)
        passes = max(len(lookup.full_grads) for lookup in lookups)
        gradients = [together([_positions(lookup, turn) for lookup in lookups]) for turn in range(passes)]
        alone = len(lookups) == len(self.lookups) and len(self.modules) == 1
        groups = self.lookups.segments() if alone else group(lookups, self.modules, fused)
        ids = together([ids_of(lookup) for lookup in lookups])
        padding = cast("int | None", self.modules[index].padding_idx)
        gather_perturb_backward(into, gradients, ids, groups, padding_idx=padding, fused=fused)
        if into is not weight.grad:  # there was none, or another use of the table has brought a sparse one
            weight.grad = into if weight.grad is None else into + weight.grad
        for lookup in lookups:
            lookup.full_grads.clear()


def _positions(lookup: Lookup, turn: int) -> Tensor:
    """[N, D]: the gradient of one full pass."""
    kept = lookup.full_grads
    grad = kept[turn] if turn < len(kept) else torch.zeros_like(kept[0])
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
