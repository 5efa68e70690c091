"""The random numbers of a captured step: generators that a CUDA graph knows, one for each place a step goes back to.

A graph cannot put a generator back in the middle: it would read a state that is fixed when it is captured. It can draw
from several generators. With dropout="same" every pass after the first draws from one of its own, set to where the
default one stands before each replay, and every random start from one that is seeded before each replay. So a replay
draws what the step would have drawn without the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class Streams:
    """What a step needs is counted while it warms up; then the generators are made, before the capture begins."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.default = torch.cuda.default_generators[index]
        self.capturing = False
        self.passes: list[torch.Generator] = []  # after the first
        self.starts: list[torch.Generator] = []
        self._own = self.default.graphsafe_get_state()
        self._now = self._own
        self._passes = self._starts = 0  # so far in this step
        self._most_passes = self._most_starts = 0

    def begin(self) -> None:
        """A step begins."""
        self._passes = self._starts = 0

    def make(self, graph: torch.cuda.CUDAGraph) -> None:
        """Make what was counted, and tell the graph."""
        self.passes = [self.default.clone_state() for _ in range(self._most_passes)]
        self.starts = [self.default.clone_state() for _ in range(self._most_starts)]
        for generator in (*self.passes, *self.starts):
            graph.register_generator_state(generator)

    def prepare(self, seed: int) -> None:
        """Before a replay: each where the step without the graph would have it."""
        state = self.default.get_state()
        for generator in self.passes:
            generator.set_state(state)
        for index, generator in enumerate(self.starts):
            generator.manual_seed(seed + index)

    def next_pass(self) -> None:
        """A pass that draws what the step's first pass drew begins."""
        self._passes += 1
        self._most_passes = max(self._most_passes, self._passes)
        if self.capturing:
            self._switch(self.passes[self._passes - 1])

    @contextlib.contextmanager
    def start(self) -> Iterator[None]:
        """Inside, a random start is drawn."""
        self._starts += 1
        self._most_starts = max(self._most_starts, self._starts)
        before = self._now
        if self.capturing:
            self._switch(self.starts[self._starts - 1])
        try:
            yield
        finally:
            self._switch(before)

    def end(self) -> None:
        """The step is over: the default generator draws as itself."""
        self._switch(self._own)

    def _switch(self, generator: torch.Generator) -> None:
        if generator is not self._now:
            self.default.graphsafe_set_state(generator)
            self._now = generator
