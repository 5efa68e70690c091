"""The states of the generators that a model's forward draws from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RngState(NamedTuple):
    """torch's CPU and CUDA generators, and Python's own (layer dropping uses it)."""

    cpu: Tensor
    cuda: Tensor | None
    python: Any


def save(device: torch.device) -> RngState:
    """The generators as they stand, for a model on `device`."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return RngState(torch.get_rng_state(), cuda, random.getstate())


def restore(state: RngState, device: torch.device) -> None:
    """Put the generators back."""
    torch.set_rng_state(state.cpu)
    if state.cuda is not None:
        torch.cuda.set_rng_state(state.cuda, device)
    random.setstate(state.python)


@contextlib.contextmanager
def apart(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a stream of its own: what is drawn here moves no dropout mask."""
    state = save(device)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        restore(state, device)


def new_seed() -> int:
    """A seed for `apart`, from torch's own CPU generator: reading it waits for no device."""
    return int(torch.randint(2**63 - 1, (), device="cpu"))
