"""What a norm is over, and the kind of perturbation that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fastadv.engine.buffers import Buffers
from fastadv.engine.lookups import Lookups
from fastadv.engine.model.find import vocabulary
from fastadv.engine.perturb.perturbation import Perturbation
from fastadv.engine.perturb.positions import PositionPerturbation
from fastadv.engine.perturb.ranks import Ranks
from fastadv.engine.perturb.rows import RowPerturbation
from fastadv.engine.perturb.tied_tables import TiedTables, tied_weights

SCOPES = ("table", "row", "batch", "sample", "token")
TABLE_SCOPES = ("table", "row")


def kind_of(scope: str, tied: str, modules: Sequence[nn.Module]) -> type[Perturbation]:
    """The kind of perturbation at these modules.

    Raises:
        ValueError: a table scope where a module is no table, or tables that cannot move.
    """
    if scope not in TABLE_SCOPES:
        return PositionPerturbation
    if any(vocabulary(module) is None for module in modules):
        raise ValueError(f"scope={scope!r} needs an nn.Embedding; for another module's output use scope='sample'")
    if tied != "both":
        return RowPerturbation
    tied_weights(modules)
    return TiedTables


def maker(
    kind: type[Perturbation], scope: str, buffers: Buffers, ranks: Ranks | None, agree: Callable[[], None]
) -> Callable[[Lookups], Perturbation]:
    """What makes a step's. It does not hold the engine, which would then wait for the garbage collector."""

    def made(lookups: Lookups) -> Perturbation:
        perturbation = kind(lookups, scope, buffers)
        perturbation.meeting = None if ranks is None else ranks.meet(agree)
        return perturbation

    return made
