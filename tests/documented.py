"""The methods that pages and docstrings construct, as they construct them, for another model than theirs."""

from __future__ import annotations

import doctest
import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import fastadv
from fastadv.classic import ClassicFGM, ClassicPGD, by_position
from fastadv.jobs.method_options import methods
from fastadv.methods import Method
from fastadv.methods.options import options_of
from tests.pages import RUNNABLE, run

OF_THE_MODEL = (
    "split",
    "backward",
    "scaler",
    "start_step",
    "probe_dtype",
    "communication",
    "emb_name",
)  # what says nothing of a radius


@dataclass(frozen=True)
class Construction:
    """A method's class, and what it was given besides the model and the defaults."""

    method: type[Method]
    options: dict[str, Any]

    def around(self, model: nn.Module) -> Method:
        inner = {key: value.around(model) for key, value in self.options.items() if isinstance(value, Construction)}
        return self.method(model, **{**self.options, **inner})

    def __str__(self) -> str:
        shown = ", ".join(f"{key}={_shown(value)}" for key, value in sorted(self.options.items()))
        return f"{self.method.__name__}({shown})"


def _shown(value: Any) -> str:
    return getattr(value, "__name__", str(value))


def documented(folder: Path) -> dict[str, Construction]:
    """Every different construction of the pages and of the methods' docstrings."""
    with _recorded() as found:
        for page in RUNNABLE:
            run(page, folder)
        for module in {method.__module__ for method in methods().values()}:
            doctest.testmod(importlib.import_module(module))
    return {str(one): one for one in found}


@contextmanager
def _recorded() -> Iterator[list[Construction]]:
    found: list[Construction] = []
    suggest = fastadv.suggest_radius  # what it would find for the pages' toy is not MiniLM's
    made: dict[int, tuple[Method, Construction]] = {}  # the method too, so that no other takes its id
    new = Method.__new__

    def record(cls: type[Method], *arguments: Any, **options: Any) -> Method:
        method = new(cls, *arguments, **options)
        kept = {
            key: made[id(value)][1] if id(value) in made else value
            for key, value in _unusual(cls, arguments[1:], options).items()
        }
        made[id(method)] = method, Construction(cls, kept)
        found.append(made[id(method)][1])
        return method

    Method.__new__ = record
    fastadv.suggest_radius = lambda *_, **__: fastadv.Radius(0.1)
    try:
        yield found
    finally:
        Method.__new__ = new
        fastadv.suggest_radius = suggest


def _unusual(cls: type[Method], arguments: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """The options by name, without those that say nothing of a radius or what is the default anyway."""
    if issubclass(cls, (ClassicFGM, ClassicPGD)):
        named = by_position(cls, arguments)
    else:
        named = dict(zip(list(inspect.signature(cls.__init__).parameters)[2:], arguments, strict=False))
    given, defaults = {**named, **options}, options_of(cls)
    return {
        name: value
        for name, value in given.items()
        if name not in OF_THE_MODEL and not (name in defaults and defaults[name] == value)
    }
