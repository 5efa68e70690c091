"""What a campaign's faults meet: every method in every scope, with options that are drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

import fastadv
from fastadv import native

Make = Callable[..., fastadv.Method]
POSITIONS, TABLES = ("batch", "sample", "token"), ("table", "row")
ACTIONS = ("backward", "find", "applied", "perturbed", "classic", "unattacked")
EARLIER = ("none", "some", "all", "kept")


def held(method: Make, model: nn.Module, **options: Any) -> fastadv.Method:
    """A method near its teacher."""
    return fastadv.BregmanProximal(model, 1.0, 0.9, method=method(model, **options))


SEARCHING: dict[str, Make] = {
    "FGSM": partial(fastadv.FGSM, epsilon=0.1),
    "FGM": fastadv.FGM,
    "PGD": fastadv.PGD,
    "YOPO": partial(fastadv.YOPO, steps=2, inner_steps=2, split="first"),
    "FreeLB": partial(fastadv.FreeLB, steps=2),
    "SMART": partial(fastadv.SMART, epsilon=0.1),
    "VAT": fastadv.VAT,
}
POSITIONAL: dict[str, Make] = {
    "FreeAT": partial(fastadv.FreeAT, epsilon=0.1),
    "LLR": partial(fastadv.LLR, epsilon=0.1),
    "NEFTune": fastadv.NEFTune,
}
UNSCOPED: dict[str, Make] = {
    "AWP": fastadv.AWP,
    "AWP, steps=2": partial(fastadv.AWP, gamma=1.0, epsilon=0.01, steps=2),
    "Bregman": fastadv.BregmanProximal,
    "Bregman of FGM": partial(held, fastadv.FGM),
    "Bregman of SMART": partial(held, partial(fastadv.SMART, epsilon=0.1)),
    "Bregman of AWP": partial(held, fastadv.AWP),
    "Bregman of PGD, tied": partial(held, partial(fastadv.PGD, tied="both", scope="table")),
}
TIED: dict[str, Make] = {
    "FGSM": partial(fastadv.FGSM, epsilon=0.1, tied="both"),
    "FGM": partial(fastadv.FGM, tied="both"),
    "PGD": partial(fastadv.PGD, tied="both"),
    "FreeLB": partial(fastadv.FreeLB, tied="both", random_start=False, steps=2),
}
MOVES_WEIGHTS = ("AWP", "AWP, steps=2", "Bregman of AWP", "Bregman of PGD, tied")
RESTARTS = ("FGSM", "PGD")  # methods with a random start as an option


@dataclass(frozen=True)
class Configuration:
    """One method with its options, and how it is called."""

    method: str
    make: Make
    options: dict[str, Any] = field(default_factory=dict)
    action: str = "backward"
    earlier: str = "none"  # which gradients there are before: none, a backward's, one everywhere, the last step's
    tied: bool = False
    compiled: str | None = None
    share: float = 1.0

    @property
    def moves_weights(self) -> bool:
        return self.method in MOVES_WEIGHTS or self.options.get("tied") == "both" or "tied" in self.method

    def __str__(self) -> str:
        options = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in self.options.items())
        model = ("a tied model" if self.tied else "") + (f"compiled ({self.compiled})" if self.compiled else "")
        parts = (f"{self.method}({options})", self.action, f"earlier {self.earlier}", model)
        return "; ".join(part for part in parts if part)


def kinds() -> list[tuple[str, Make, dict[str, Any], bool]]:
    """Every method with every scope that it takes: name, constructor, options, whether the model is tied."""
    found: list[tuple[str, Make, dict[str, Any], bool]] = [(name, make, {}, False) for name, make in UNSCOPED.items()]
    found = [(name, make, options, "tied" in name) for name, make, options, _ in found]
    for methods, scopes in ((SEARCHING, (*TABLES, *POSITIONS)), (POSITIONAL, POSITIONS)):
        found += [(name, make, {"scope": scope}, False) for name, make in methods.items() for scope in scopes]
    found += [(name, make, {"scope": scope}, True) for name, make in TIED.items() for scope in TABLES]
    return found


def draw(seed: int, actions: tuple[str, ...] = ACTIONS, compiled: str | None = None) -> Iterator[Configuration]:
    """All kinds in a drawn order, then all again, each with options drawn anew; without an end."""
    chance = random.Random(seed)
    while True:
        order = kinds()
        chance.shuffle(order)
        for name, make, options, tied in order:
            yield _drawn(chance, name, make, dict(options), tied, actions, compiled)


def _drawn(
    chance: random.Random,
    name: str,
    make: Make,
    options: dict[str, Any],
    tied: bool,
    actions: tuple[str, ...],
    compiled: str | None,
) -> Configuration:
    options["fused"] = chance.choice([None, False] if native.available() else [False])
    options["dropout"] = chance.choice(["fresh", "fresh", "same", "off"])
    if chance.random() < 0.2:
        options["probe_dtype"] = torch.bfloat16
    if name in RESTARTS and not tied and chance.random() < 0.4:
        options.update(random_start=True, clean_weight=0)
    elif options.get("scope") in POSITIONS and not compiled and chance.random() < 0.2:
        options["embedding"] = "first" if name != "YOPO" else "embed"  # another module's output: by a hook
    action = chance.choice([one for one in actions if _can(one, name, options, tied)])
    if action == "unattacked":
        options["start_step"] = 1_000_000
    if name == "Bregman of PGD, tied":
        options.pop("probe_dtype", None)
    earlier = chance.choice(EARLIER)
    return Configuration(name, make, options, action, earlier, tied, compiled, chance.choice([1.0, 1.0, 0.5]))


def _can(action: str, name: str, options: dict[str, Any], tied: bool) -> bool:
    if action in ("find", "applied"):
        return name not in UNSCOPED
    if action == "perturbed":
        return not name.startswith("Bregman")
    if action == "classic":
        return name in ("FGM", "PGD") and options.get("scope") in TABLES
    return True
