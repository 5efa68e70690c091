"""The states of a process's random generators as tensors, to be saved and put back."""

from __future__ import annotations

import random

import numpy.random  # noqa: F401 - so that its state is saved with the others
import torch
from torch import Tensor

from fastadv.engine.safety import rng


def save(device: torch.device) -> dict[str, Tensor]:
    """Take the states: torch's, of the CPU and the device, Python's and numpy's."""
    state = rng.save(device)
    _, words, _ = state.python
    _, keys, place, *_ = state.numpy
    found = {"cpu": state.cpu, "python": torch.tensor(words), "numpy": torch.tensor([*keys.tolist(), place])}
    return found if state.device is None else {**found, "device": state.device}


def restore(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `save` has taken."""
    *keys, place = state["numpy"].tolist()
    python = (random.getstate()[0], tuple(state["python"].tolist()), None)
    rng.restore(rng.RngState(state["cpu"], state.get("device"), python, ("MT19937", keys, place, 0, 0.0)), device)
