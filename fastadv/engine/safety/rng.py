"""The states of the generators that a model's forward draws from."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastadv.engine.capture.streams import Streams


class RngState(NamedTuple):
    """torch's generators, of the CPU and of the model's device, and Python's own and numpy's.

    Models draw from the last two as well: which layers to drop, which spans to mask.
    """

    cpu: Tensor
    device: Tensor | None
    python: Any
    numpy: Any


_streams: Streams | None = None  # of the step that is being captured, or warms up for it


@contextlib.contextmanager
def drawing_from(streams: Streams) -> Iterator[None]:
    """Inside, steps draw as a captured step does."""
    global _streams  # noqa: PLW0603
    _streams = streams
    try:
        yield
    finally:
        _streams = None


def capturing() -> bool:
    """Whether what happens now is recorded, and happens later."""
    return _streams is not None and _streams.capturing


def recorded() -> bool:
    """Whether a step is being captured, or warms up for it: its seeds are counted."""
    return _streams is not None


def save(device: torch.device) -> RngState:
    """The generators as they stand, for a model on `device`."""
    state = None
    if device.type == "cuda":
        state = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state = torch.mps.get_rng_state()
    numpy = sys.modules.get("numpy.random")
    return RngState(torch.get_rng_state(), state, random.getstate(), numpy and numpy.get_state())


def restore(state: RngState, device: torch.device) -> None:
    """Put the generators back."""
    torch.set_rng_state(state.cpu)
    if state.device is not None and device.type == "mps":
        torch.mps.set_rng_state(state.device)
    elif state.device is not None:
        torch.cuda.set_rng_state(state.device, device)
    random.setstate(state.python)
    if state.numpy is not None:
        sys.modules["numpy.random"].set_state(state.numpy)


class Replayed:
    """The state that the passes of a step begin with, so that each draws what the first one drew."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._state = None if capturing() else save(device)
        self._lead = 0 if _streams is None else _streams.drawn()

    def again(self) -> None:
        """Another pass begins."""
        if _streams is not None:
            _streams.next_pass(self._lead)
        if self._state is not None:
            restore(self._state, self._device)


def end_step() -> None:
    """What generators a step has gone through, it leaves."""
    if _streams is not None:
        _streams.end()


def apart(seed: int, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Draw from a stream of its own: what is drawn here moves no dropout mask."""
    return _Seeded(seed, device) if _streams is None else _of_a_graph(_streams, seed, device)


@contextlib.contextmanager
def _of_a_graph(streams: Streams, seed: int, device: torch.device) -> Iterator[None]:
    with streams.start(seed), contextlib.nullcontext() if capturing() else _Seeded(seed, device):
        yield  # while it is captured the seed comes before each replay


class _Seeded:
    """A block with generators of this seed. No generator of Python: one left half way would put states back late."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed, self._device = seed, device

    def __enter__(self) -> None:
        seed, device = self._seed, self._device
        self._state = save(device)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif device.type == "mps":
            torch.mps.manual_seed(seed)

    def __exit__(self, *_: object) -> None:
        restore(self._state, self._device)


def new_seed() -> int:
    """A seed for `apart`, from torch's own CPU generator: reading it waits for no device."""
    seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    if _streams is not None:
        _streams.seeded(seed)
    return seed
