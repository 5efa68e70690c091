"""The states of a process's random generators as tensors, to be saved and put back."""

from __future__ import annotations

import random
import sys

import torch
from torch import Tensor

from fastadv.engine.safety import rng

NUMPY = "numpy"


def save(device: torch.device) -> dict[str, Tensor]:
    """Take the states: torch's, of the CPU and the device, Python's and, where it is loaded, numpy's."""
    state = rng.save(device)
    _, words, _ = state.python
    found = {"cpu": state.cpu, "python": torch.tensor(words)}
    if state.device is not None:
        found["device"] = state.device
    if NUMPY in sys.modules:
        _, keys, place, *_ = state.numpy or sys.modules["numpy.random"].get_state()
        found[NUMPY] = torch.tensor([*keys.tolist(), place])
    return found


def restore(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `save` has taken."""
    *keys, place = state[NUMPY].tolist() if NUMPY in state else [0]
    numpy = ("MT19937", keys, place, 0, 0.0) if keys else None
    python = (random.getstate()[0], tuple(state["python"].tolist()), None)
    if numpy is not None:
        import numpy.random  # noqa: F401 - the training that was saved had it loaded
    rng.restore(rng.RngState(state["cpu"], state.get("device"), python, numpy), device)
