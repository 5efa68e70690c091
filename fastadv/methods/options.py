"""The options that methods share, typed, and the checks that name them."""

from __future__ import annotations

import difflib
import inspect
import math
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from typing_extensions import TypedDict

from fastadv.engine.model.find import EmbeddingChoice
from fastadv.engine.owner import Backward, Owner
from fastadv.engine.perturb.ranks import Group

Norm = Literal["l2", "linf"]
Direction = Literal["l2", "sign", "max", "adam", "adamw", "rmsprop"]
Ball = Literal["l2", "linf"]
Clamp = Literal["batch"]
Scope = Literal["table", "row", "batch", "sample", "token"]
Dropout = Literal["fresh", "same", "off"]
Tied = Literal["lookup", "both"]
AttackMode = Literal["eval"]
Communication = Literal["each", "last", "keep"]

DIRECTIONS, BALLS, CLAMPS = (typing.get_args(choice) for choice in (Direction, Ball, Clamp))

SHARED: dict[str, Any] = {
    "start_step": 0,
    "every": 1,
    "dropout": "fresh",
    "fused": None,
    "backward": None,
    "scaler": None,
    "atomic": True,
    "probe_dtype": None,
    "communication": "each",
    "embedding": None,
    "relative": False,
    "process_group": None,
    "direction": "by norm",
    "ball": "by norm",
    "clamp": None,
    "tied": "lookup",
    "attack_mode": None,
}
"""The defaults of the options below."""

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
    communication: Communication


class NoiseOptions(StepOptions, total=False):
    """The options of methods that perturb embeddings, with or without a search."""

    embedding: EmbeddingChoice
    relative: bool
    process_group: Group


class EmbeddingOptions(NoiseOptions, total=False):
    """The options of methods that search for a perturbation of embeddings."""

    direction: Direction
    ball: Ball | None
    clamp: Clamp | None


class TiedOptions(EmbeddingOptions, total=False):
    """The options of methods whose search stands apart: it can move a tied table itself, or run in another mode."""

    tied: Tied
    attack_mode: AttackMode | None


def check_options(method: type, given: Mapping[str, Any]) -> None:
    """Raise TypeError for an option that `method` does not take: with the right line, and all that it takes."""
    accepted = options_of(method)
    known = {*accepted, *getattr(method, "_classic", ())}
    meant = {name: name if name in known else _meant(name, accepted) for name in given}
    for name in given:
        if name not in known:
            hint = f": did you mean {meant[name]!r}?" if meant[name] else "."
            right = ", ".join(f"{meant[one]}={shown(value)}" for one, value in given.items() if meant[one])
            line = f" Write fastadv.{method.__name__}(model, {right})." if meant[name] else ""
            raise TypeError(
                f"{method.__name__} has no option {name!r}{hint}{line} It takes {', '.join(sorted(accepted))}."
            )


def _meant(name: str, accepted: Mapping[str, Any]) -> str:
    """The option that another code calls `name`, or that is spelt nearly so; "" where there is none."""
    known = ELSEWHERE.get(name, "")
    for option in (known, "epsilon" if known == "step_size" else ""):  # FGM's step is epsilon
        if option in accepted:
            return option
    return next(iter(difflib.get_close_matches(name, accepted, 1)), "")


def shown(value: object) -> str:
    """An option's value as a user would write it; an object that is no plain value, by its kind."""
    if isinstance(value, (str, int, float, type(None), torch.dtype)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return f"<{getattr(value, '__name__', type(value).__name__)}>"


def options_of(method: Any) -> Mapping[str, Any]:
    """The options that a method's constructor takes, with their defaults; not the classic scripts' names for them."""
    found: dict[str, Any] = {}
    for cls in method.__mro__:
        if "__init__" not in cls.__dict__ or cls is object:
            continue
        parameters = list(inspect.signature(cls.__init__).parameters.values())[2:]
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = {p.name: p.default for p in parameters if p.kind not in variadic}
        found = {**named, **found}
        table = _table(cls)
        if table is not None:
            found |= {name: SHARED[name] for name in typing.get_type_hints(table)}
        if table is not None or all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    if "dropout" in found:
        found["dropout"] = getattr(method, "_dropout", "fresh")
    for name in getattr(method, "_classic", ()):
        found.pop(name, None)
    return MappingProxyType(found)


def _table(cls: type) -> Any:
    """The TypedDict of a constructor's `**options: Unpack[TypedDict]`; None where there is none."""
    hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    inside = [typing.get_args(hint)[0] for hint in hints.values() if typing.get_args(hint)]
    return next((one for one in inside if hasattr(one, "__total__")), None)


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


def scalar(name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` as a 0-d tensor without a graph, or an error that names it. Nothing waits for what it holds."""
    if value.numel() != 1 or not (value.is_floating_point() or value.dtype in (torch.int32, torch.int64)):
        raise ValueError(
            f"{name} must be a number or a 0-d tensor, not a tensor of {tuple(value.shape)}, {value.dtype}"
        )
    return value.detach().reshape(())


def whole(name: str, value: Any, least: int) -> int:
    """`value` as an int of at least `least`, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    return value
