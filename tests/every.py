"""Every method that perturbs embeddings, as a small `TinyModel` needs it: visible steps, and nothing left to chance."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import fastadv

EVERY: dict[str, Callable[..., fastadv.Method]] = {
    "fgsm": partial(fastadv.FGSM, epsilon=0.3),
    "fgm": fastadv.FGM,
    "pgd": fastadv.PGD,
    "freeat": partial(fastadv.FreeAT, epsilon=0.3),
    "yopo": partial(fastadv.YOPO, split="ff1", step_size=1.0, random_start=False),
    "freelb": partial(fastadv.FreeLB, step_size=1.0, random_start=False),
    "neftune": fastadv.NEFTune,
    "llr": partial(fastadv.LLR, epsilon=0.3),
    "smart": partial(fastadv.SMART, epsilon=0.3),
    "vat": fastadv.VAT,
}
"""By name; a position scope or another argument may be given on top."""


def every_but(*names: str) -> dict[str, Callable[..., fastadv.Method]]:
    """All of them without those whose meaning differs."""
    return {name: make for name, make in EVERY.items() if name not in names}
