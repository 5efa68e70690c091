"""The random numbers of a captured step: generators that a CUDA graph knows, one for each place a step goes back to.

A graph cannot put a generator back in the middle: it would read a state that is fixed when it is captured. It can draw
from several generators. With dropout="same" every pass after the first draws from one of its own, set before each
replay to where the first pass will find the default one, and every random start from one that is seeded before each
replay. So a replay draws what the run would have drawn without the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch


class Streams:
    """What a run of the function needs is noted while it warms up; then the generators are made, before the capture."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self.default = torch.cuda.default_generators[index]
        self.capturing = False
        self._leads: list[int] = []  # of each pass that goes back: what the run had drawn where it goes back to
        self._origins: list[tuple[int, int]] = []  # of each start: which of the run's seeds it is, and how much more
        self._passes: list[torch.Generator] = []
        self._starts: list[torch.Generator] = []
        self._own = self.default.graphsafe_get_state()
        self._now = self._own
        self._begun = 0  # the default generator's offset when the run began
        self._pass = self._start = 0  # so far in this run
        self._seeds: list[int] = []  # likewise

    def begin(self) -> None:
        """A run of the function begins: of one step, or several."""
        self._pass = self._start = 0
        self._seeds = []
        if not self.capturing:
            self._leads, self._origins = [], []
            self._begun = _offset(self.default)

    def make(self, register: Callable[[torch.Generator], None]) -> None:
        """Make a generator for all that was noted in the last run, and tell the graph."""
        self._passes = [self.default.clone_state() for _ in self._leads]
        self._starts = [self.default.clone_state() for _ in self._origins]
        for generator in (*self._passes, *self._starts):
            register(generator)

    def prepare(self, new_seed: Callable[[], int]) -> None:
        """Before a replay: each where the run without the graph would have it."""
        state = self.default.get_state()
        for lead, generator in zip(self._leads, self._passes, strict=True):
            ahead = state.clone()
            ahead.view(torch.int64)[1] += lead
            generator.set_state(ahead)
        seeds = [new_seed() for _ in range(1 + max((index for index, _ in self._origins), default=-1))]
        for (index, more), generator in zip(self._origins, self._starts, strict=True):
            generator.manual_seed(seeds[index] + more)

    def drawn(self) -> int:
        """What the run has drawn so far; a graph is not asked, it draws as the last warm-up did."""
        return 0 if self.capturing else _offset(self.default) - self._begun

    def next_pass(self, lead: int) -> None:
        """A pass begins that draws what was drawn when the run had drawn `lead`."""
        if self.capturing:
            self._switch(self._passes[self._pass])
        else:
            self._leads.append(lead)
        self._pass += 1

    def seeded(self, seed: int) -> None:
        """A step has drawn the seed of its starts."""
        self._seeds.append(seed)

    @contextlib.contextmanager
    def start(self, seed: int) -> Iterator[None]:
        """Inside, a random start is drawn, which `seed` says."""
        before = self._now
        if self.capturing:
            self._switch(self._starts[self._start])
        else:
            self._origins.append((len(self._seeds) - 1, seed - self._seeds[-1]))
        self._start += 1
        try:
            yield
        finally:
            self._switch(before)

    def end(self) -> None:
        """A step is over: the default generator draws as itself."""
        self._switch(self._own)

    def recover(self) -> None:
        """After a capture that failed: up to torch 2.11 the default generator may be left in it, and refuse to draw.

        It then goes on in a state that is a copy. Graphs that were captured before know the old one, and draw on there.
        """
        self.end()
        try:
            torch.rand(1, device=self.default.device)
        except RuntimeError:
            self.default.graphsafe_set_state(self.default.clone_state())

    def _switch(self, generator: torch.Generator) -> None:
        if generator is not self._now:
            self.default.graphsafe_set_state(generator)
            self._now = generator


def _offset(generator: torch.Generator) -> int:
    """How far it has gone. The state of a CUDA generator is two numbers, on the host: its seed and this one."""
    return int(generator.get_state().view(torch.int64)[1])
