"""The modules, parameters and buffers of a model, listed again only when one of them is another than before."""

from __future__ import annotations

import functools
from itertools import chain, repeat
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv import native

CHILDREN = ("_modules",)
KINDS, TRAINING = (*CHILDREN, "_parameters", "_buffers"), itemgetter("training")
COMPILED = "_compiled_call_impl"


class Holding(NamedTuple):
    """The dictionaries in which a module keeps its children, parameters and buffers, and what was in them."""

    fields: dict[str, Any]  # the module's own
    kept: dict[str, tuple[dict[str, Any], dict[str, Any]]]  # each of these dictionaries, and a copy
    passing: frozenset[str]  # buffers that no state_dict has

    def put_back(self) -> None:
        """Let it have the same again, and no others."""
        for kind, (kept, copy) in self.kept.items():
            if self.fields.get(kind) is not kept:
                self.fields[kind] = kept
            if list(kept) != list(copy) or not all(map(is_, kept.values(), copy.values())):
                kept.clear()
                kept.update(copy)
        passing = self.fields.get("_non_persistent_buffers_set")
        if passing is not None and passing != self.passing:
            passing.clear()
            passing.update(self.passing)


class Inventory:
    """What one model has, as it was when somebody last had a `look`.

    Walking a model costs more than all else that a step does beside its passes. So a step compares what hangs in the
    modules' own dictionaries with what hung there before, one by one and by identity, and walks only where they differ.

    Attributes:
        modules: every module once, as `model.modules()` lists them.
        parameters: of these modules; one that two of them share comes twice.
        buffers: of these modules: who has it, its name there, and the buffer.
        holdings: how these hang in the modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules: list[nn.Module] = []
        self.parameters: list[nn.Parameter] = []
        self.buffers: list[tuple[nn.Module, str, Tensor]] = []
        self.holdings: list[Holding] = []
        self._fields: list[dict[str, Any]] = []  # the modules' own dictionaries
        self._children: list[Any] | None = None
        self._members: list[Any] | None = None  # what hangs in these; None: not all modules keep it there

    def look(self) -> None:
        """Bring the lists up to date: new lists where anything is another, so that one may hold on to the old ones."""
        if not self._is_current():
            self._list()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    def compiled(self) -> int:
        """How many modules run another call than their class's: `compile()` replaces no child and no parameter."""
        return sum(map(dict.__contains__, self._fields, repeat(COMPILED)))

    def modes(self) -> list[bool]:
        """Of each module, whether it is in training mode."""
        try:
            return list(map(TRAINING, self._fields))
        except KeyError:  # a property, as of a compiled model
            return [module.training for module in self.modules]

    def _is_current(self) -> bool:
        if not _have(self._fields, KINDS, self._members):
            return False
        return all(module._buffers.get(name) is buffer for module, name, buffer in self.buffers)  # not renamed

    def _list(self) -> None:
        if not _have(self._fields, CHILDREN, self._children):
            self._children = None
            self.modules = list(self.model.modules())
            self._fields = [vars(module) for module in self.modules]
            self._children = _members(self._fields, CHILDREN)
        self._members = None  # until all lists are there: an interrupt must not leave some of them old
        every = [parameter for module in self.modules for parameter in module._parameters.values()]
        self.parameters = [parameter for parameter in every if parameter is not None]
        named = [(module, *item) for module in self.modules for item in module._buffers.items()]
        self.buffers = [(module, name, buffer) for module, name, buffer in named if buffer is not None]
        self.holdings = list(map(_holding, self._fields))
        self._members = _members(self._fields, KINDS)


def _holding(fields: dict[str, Any]) -> Holding:
    kept = {kind: (own, dict(own)) for kind in KINDS if isinstance(own := fields.get(kind), dict)}
    return Holding(fields, kept, frozenset(fields.get("_non_persistent_buffers_set", ())))


def _have(fields: list[dict[str, Any]], kinds: tuple[str, ...], known: list[Any] | None) -> bool:
    """Whether the modules with these dictionaries have `known` members of these kinds, and no others."""
    if known is None:
        return False
    same = _in_cpp()
    if same is not None and same(fields, kinds, known):
        return True
    now = _members(fields, kinds)  # C++ cannot tell where a module keeps its members in no dictionary
    return now is not None and len(now) == len(known) and all(map(is_, now, known))


@functools.cache
def _in_cpp() -> Any:
    """The comparison in C++, where that is there."""
    return getattr(native.extension(), "same_members", None) if native.available() else None


def _members(fields: list[dict[str, Any]], kinds: tuple[str, ...]) -> list[Any] | None:
    """Every child, parameter and buffer of the modules with these dictionaries; None where one has no such."""
    members: list[Any] = []
    try:
        for kind in kinds:
            members += chain.from_iterable([own.values() for one in fields if (own := one[kind])])
    except KeyError:
        return None
    return members
