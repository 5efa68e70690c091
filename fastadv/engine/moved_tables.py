"""`tied="both"`: the tables themselves are moved, in place, as the classic scripts do it.

A tied output layer moves along, which a perturbation of the lookups cannot do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastadv.engine.call import Call
from fastadv.engine.moved_table import MovedTable
from fastadv.engine.perturbation import Perturbation, mean_norm
from fastadv.engine.rule import Rule
from fastadv.engine.site import Site
from fastadv.engine.start import Draw


class MovedTables(Perturbation):
    """Every table with a norm of its own."""

    in_place = True

    def __init__(self, site: Site, scope: str) -> None:
        super().__init__(site, scope)
        self.weights = list({id(module.weight): _plain(module) for module in site.modules}.values())
        self.tables = [MovedTable(weight, site.fused) for weight in self.weights]
        self.gradients: list[Tensor | None] = []
        self._last: list[Tensor] = []

    def reset(self) -> None:
        """Back to where they were."""
        self._last = [r for table in self.tables if (r := table.perturbation()) is not None] or self._last
        for table in self.tables:
            table.restore()

    def begin(self) -> None:
        """A new step; memory that the model was given since then is the memory that moves."""
        self.reset()
        self._last = []
        self.gradients = []
        self.tables = [MovedTable(weight, self.site.fused) for weight in self.weights]

    def start(self, draw: Draw, seed: int, call: Call) -> None:
        """Never asked for: `Method` refuses it."""
        raise NotImplementedError

    # Where gradients come from

    def leaves(self) -> list[Tensor]:
        """The tables."""
        return list(self.weights)

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """What a probe found."""
        self.gradients = list(gradients)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Keep what a full pass brings to each table, whatever is in its `.grad` already."""
        found: dict[int, Tensor] = {}
        hooks = [
            weight.register_hook(functools.partial(found.__setitem__, index))  # type: ignore[no-untyped-call]
            for index, weight in enumerate(self.weights)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.gradients = [found.get(index) for index in range(len(self.weights))]

    def has_gradient(self) -> bool:
        """Whether the last pass left one."""
        return any(gradient is not None for gradient in self.gradients)

    # The step

    @torch.no_grad()
    def ascend(self, rule: Rule) -> None:
        """Move every table up its gradient."""
        for table, gradient in zip(self.tables, self.gradients, strict=True):
            if gradient is not None:
                table.step(gradient, rule, 0 if self.scope == "table" else 1, self.count_on(gradient.device))
        self.gradients = []

    def norm(self, kind: str) -> Tensor:
        """Of the tables' perturbations, as they were at the end of the step."""
        return mean_norm(self._last, 0 if self.scope == "table" else 1, kind)


def _plain(module: nn.Module) -> Tensor:
    weight = cast(Tensor, module.weight)
    if type(weight) not in (nn.Parameter, Tensor) or not weight.requires_grad:
        raise ValueError(
            "tied='both' moves the table in place, so it must be a plain tensor that is trained; this one is "
            f"{'frozen' if not weight.requires_grad else type(weight).__name__}. tied='lookup' needs neither"
        )
    return weight
