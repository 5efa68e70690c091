"""Every method that perturbs embeddings, as a small `TinyModel` needs it: visible steps, and nothing left to chance."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastadv


def waves(shape: tuple[int, ...], mask: Tensor) -> Tensor:
    """A start where chance has no part."""
    count = torch.arange(math.prod(shape), dtype=torch.float64, device=mask.device)
    return 0.1 * torch.sin(count).view(shape)


EVERY: dict[str, Callable[..., fastadv.Method]] = {
    "fgsm": partial(fastadv.FGSM, epsilon=0.3),
    "fgm": fastadv.FGM,
    "pgd": fastadv.PGD,
    "freeat": partial(fastadv.FreeAT, epsilon=0.3),
    "yopo": partial(fastadv.YOPO, split="ff1", step_size=1.0, random_start=False),
    "freelb": partial(fastadv.FreeLB, step_size=1.0, random_start=False),
    "neftune": partial(fastadv.NEFTune, random_start=waves),
    "llr": partial(fastadv.LLR, epsilon=0.3, random_start=waves),
    "smart": partial(fastadv.SMART, epsilon=0.3, random_start=waves),
    "vat": partial(fastadv.VAT, random_start=waves),
}
"""By name; a position scope or another argument may be given on top."""

COMPARING = {"smart": fastadv.SMART, "vat": fastadv.VAT}
"""Those that compare the outputs of two passes."""
HOLDING = {**COMPARING, "llr": fastadv.LLR}
"""Those whose penalty needs the clean pass and the perturbed one in one graph."""


def every_but(*names: str) -> dict[str, Callable[..., fastadv.Method]]:
    """All of them without those whose meaning differs."""
    return {name: make for name, make in EVERY.items() if name not in names}


def in_scopes(*scopes: str, without: str = "") -> list[tuple[str, str]]:
    """Every method's name with every scope that it takes: some have a perturbation per position alone."""
    return [
        (name, scope)
        for name in EVERY
        for scope in scopes
        if name != without and not (name in ("freeat", "neftune", "llr") and scope in ("table", "row"))
    ]
