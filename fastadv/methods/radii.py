"""Radii: one for all perturbed modules, or one for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from fastadv.engine.model import find
from fastadv.methods.options import number

T = TypeVar("T")
U = TypeVar("U")

Size = float | Sequence[float] | Mapping[str, float]
Radius = float | None | Sequence[float | None] | Mapping[str, float | None]

HOW_MANY = (
    "{name} has {given} values for {count} perturbed modules ({sites}): give one for all, or one each in that order"
)
WHO = "{name} says nothing of {missing}: give one for all, or one for each of embedding= by name ({sites})"
ONE_TABLE = (
    "an epsilon or a step_size for each perturbed module needs a perturbation for each, and scope={scope!r} has one "
    "for all tables: use scope='token', 'sample' or 'batch'"
)
NOT_PERTURBED = "{name} names {key!r}, which embedding= does not perturb; it perturbs {sites}"


def by_site(name: str, given: Any, model: nn.Module, choice: find.EmbeddingChoice) -> float | list[float | None] | None:
    """`given` as a number (None: none), or one for each perturbed module in the order of `choice`.

    Args:
        name: of the option.
        given: a number or None; a sequence; or a dict by what `embedding=` would take: a name, a pattern, a pair.
        model: the user's.
        choice: the user's `embedding=`.

    Raises:
        TypeError, ValueError: no finite number of at least 0, or not as many as there are perturbed modules.
    """
    if not isinstance(given, (Mapping, list, tuple)):
        return _one(name, given)
    sites = find.sites(model, choice)
    names = ", ".join(find.names(model, sites))
    values = _named(name, given, model, sites) if isinstance(given, Mapping) else list(given)
    if len(values) != len(sites):
        raise ValueError(HOW_MANY.format(name=name, given=len(values), count=len(sites), sites=names))
    return [_one(name, value) for value in values]


def _one(name: str, value: Any) -> float | None:
    return None if value is None and name == "epsilon" else number(name, value)


def _named(name: str, given: Mapping[Any, Any], model: nn.Module, sites: Sequence[find.Site]) -> list[Any]:
    names = find.names(model, sites)
    found: dict[find.Site, Any] = {}
    for key, value in given.items():
        for site in find.sites(model, key):
            if site not in sites:
                raise ValueError(NOT_PERTURBED.format(name=name, key=key, sites=", ".join(names)))
            found[site] = value
    missing = [one for one, site in zip(names, sites, strict=True) if site not in found]
    if missing:
        raise ValueError(WHO.format(name=name, missing=", ".join(missing), sites=", ".join(names)))
    return [found[site] for site in sites]


def together(one: T | list[T], other: U | list[U]) -> list[tuple[T, U]]:
    """Of each module both; one pair where both are for all."""
    count = max(len(each) if isinstance(each, list) else 1 for each in (one, other))
    return list(zip(listed(one, count), listed(other, count), strict=True))


def listed(value: T | list[T], count: int = 1) -> list[T]:
    """One for each of so many; as it is where it has each already."""
    return value if isinstance(value, list) else [value] * count
