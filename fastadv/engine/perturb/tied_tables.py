"""`tied="both"`: the tables themselves move, in place, as in the classic scripts. A tied output layer moves along."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from fastadv.engine.buffers import Buffers
from fastadv.engine.lookups import Lookups
from fastadv.engine.model.find import is_cut, is_whole
from fastadv.engine.perturb.perturbation import Perturbation, group_norms, mean_norm
from fastadv.engine.perturb.rule import Rule
from fastadv.engine.perturb.table_rollback import TableRollback


class TiedTables(Perturbation):
    """Every table with a norm of its own. They are bit for bit what they were when the step has ended, or failed."""

    def __init__(self, lookups: Lookups, scope: str, buffers: Buffers) -> None:
        super().__init__(lookups, scope, buffers)
        self.weights = tied_weights(lookups.places.modules)
        self.tables = [TableRollback(weight, self.fused) for weight in self.weights]
        self._gradients: list[Tensor | None] = []
        self._found: list[Tensor] = []

    def settle(self) -> None:
        """Put the tables back, and keep how far they had moved."""
        self._found = self.values() or self._found
        self._restore()

    def put_back(self) -> None:
        """Put the tables back, and take the hooks off them."""
        self._restore()
        self._unhook()

    def zero_(self) -> None:
        """Put the tables back; a gradient stays."""
        self.settle()

    def _restore(self) -> None:
        for table in self.tables:
            table.restore()

    def values(self) -> list[Tensor]:
        """How far each table that moved has moved: [R, D], over its moved rows."""
        return [moved for table in self.tables if (moved := table.perturbation()) is not None]

    # Gradients: by the tables, not by the lookups

    def leaves(self) -> list[Tensor]:
        """The tables."""
        return list(self.weights)

    def take(self, gradients: Sequence[Tensor | None]) -> None:
        """Keep a probe's gradients, one per table."""
        self._gradients = list(gradients)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Around a full pass's backward: keep what it brings to each table, whatever its `.grad` holds already."""
        found: dict[int, Tensor] = {}
        for index, weight in enumerate(self.weights):
            weight.register_hook(_Keep(found, index))  # type: ignore[no-untyped-call]
        yield
        self._unhook()
        self._gradients = [found.get(index) for index in range(len(self.weights))]

    def _unhook(self) -> None:
        """Find the hooks at the tables: an interrupt may come before anybody holds their handles."""
        for weight in self.weights:
            hooks = weight._backward_hooks or {}
            for key in [key for key, hook in hooks.items() if isinstance(hook, _Keep)]:
                del hooks[key]

    def drop_gradient(self) -> None:
        """Forget the last pass's gradient."""
        self._gradients = []

    def has_gradient(self) -> bool:
        """Whether the last pass brought one."""
        return any(gradient is not None for gradient in self._gradients)

    # The step

    @torch.no_grad()
    def ascend(self, rule: Rule) -> None:
        """Move every table up its gradient."""
        group = 0 if self.scope == "table" else 1
        for table, gradient in zip(self.tables, self._gradients, strict=True):
            if gradient is not None:
                table.step(gradient, rule, group, self.buffers.skipped_on(gradient.device))
        self._gradients = []

    def norm(self, kind: str, site: int | None = None) -> Tensor:  # noqa: ARG002
        """Of the tables' perturbations, as they were at the end of the step."""
        return mean_norm([group_norms(one, 0 if self.scope == "table" else 1, kind) for one in self._found])


class _Keep:
    """A hook that keeps a table's gradient."""

    def __init__(self, found: dict[int, Tensor], index: int) -> None:
        self.found, self.index = found, index

    def __call__(self, gradient: Tensor) -> None:
        self.found[self.index] = gradient


def tied_weights(modules: Sequence[nn.Module]) -> list[Tensor]:
    """The tables of `modules`, each once.

    Raises:
        ValueError: one is frozen, or no plain tensor.
    """
    return list({id(module.weight): _plain(module) for module in modules}.values())


def _plain(module: nn.Module) -> Tensor:
    weight = cast(Tensor, module.weight)
    if not is_whole(weight) or not weight.requires_grad:
        kind = "sharded" if is_cut(weight) or hasattr(weight, "placements") else type(weight).__name__
        raise ValueError(
            "tied='both' moves the table in place, so it must be a plain tensor that is trained; this one is "
            f"{'frozen' if not weight.requires_grad else kind}. tied='lookup' needs neither"
        )
    return weight
