"""The options that methods share, typed, and the checks that name them."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import typing
from typing import Any, Literal

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from typing_extensions import TypedDict

from fastadv.engine.model.find import EmbeddingChoice
from fastadv.engine.owner import Backward, Owner

Norm = Literal["l2", "linf"]
Direction = Literal["l2", "sign", "max"]
Ball = Literal["l2", "linf"]
Scope = Literal["table", "row", "batch", "sample", "token"]
Dropout = Literal["fresh", "same", "off"]
Tied = Literal["lookup", "both"]

DIRECTIONS, BALLS = typing.get_args(Direction), typing.get_args(Ball)

# What other codes call these options: an error that knows them is more help than the nearest spelling.
ELSEWHERE = {
    "eps": "epsilon",
    "adv_max_norm": "epsilon",
    "radius": "epsilon",
    "alpha": "step_size",
    "lr": "step_size",
    "adv_lr": "step_size",
    "K": "steps",
    "k": "steps",
    "num_steps": "steps",
    "adv_steps": "steps",
    "norm_type": "norm",
    "norm_p": "norm",
    "adv_init_mag": "random_start",
    "noise_var": "random_start",
    "emb_name": "embedding",
    "m": "replays",
}


class StepOptions(TypedDict, total=False):
    """The options of every method."""

    start_step: int
    every: int
    dropout: Dropout
    fused: bool | None
    backward: Backward | Owner | None
    scaler: GradScaler | None
    atomic: bool
    probe_dtype: torch.dtype | None


class NoiseOptions(StepOptions, total=False):
    """The options of methods that perturb embeddings, with or without a search."""

    embedding: EmbeddingChoice
    relative: bool


class EmbeddingOptions(NoiseOptions, total=False):
    """The options of methods that search for a perturbation of embeddings."""

    direction: Direction
    ball: Ball | None


class TiedOptions(EmbeddingOptions, total=False):
    """The options of methods that can also move a tied table itself."""

    tied: Tied


def check_options(method: type, given: typing.Iterable[str]) -> None:
    """Raise TypeError for an option that `method` does not take: with the nearest, and all that it takes."""
    accepted = options_of(method)
    for name in given:
        if name not in accepted:
            near = (
                [ELSEWHERE[name]] if ELSEWHERE.get(name) in accepted else difflib.get_close_matches(name, accepted, 1)
            )
            hint = f": did you mean {near[0]!r}?" if near else "."
            raise TypeError(f"{method.__name__} has no option {name!r}{hint} It takes {', '.join(sorted(accepted))}.")


@functools.cache
def options_of(method: type) -> frozenset[str]:
    """The names of all options that a method's constructor takes."""
    names: set[str] = set()
    for cls in method.__mro__:
        if "__init__" not in cls.__dict__ or cls is object:
            continue
        parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]  # type: ignore[misc]
        names.update(p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD)
        rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
        if not rest:
            break
        table = _table(cls, rest[0].name)
        if table is not None:
            names.update(typing.get_type_hints(table))
            break
    return frozenset(names)


def _table(cls: type, keyword: str) -> Any:
    """The TypedDict of `**keyword: Unpack[TypedDict]`; None where it is annotated otherwise."""
    hint = typing.get_type_hints(cls.__init__).get(keyword)  # type: ignore[misc]
    found = typing.get_args(hint)
    return found[0] if found and hasattr(found[0], "__total__") else None


def check_module(model: object) -> None:
    """Raises TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def one_of(name: str, value: object, choices: Any) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in tuple(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def number(name: str, value: Any) -> float:
    """`value` as a finite float of at least 0, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, not {value}")
    return float(value)


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value
