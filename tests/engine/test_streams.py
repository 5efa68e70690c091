"""The bookkeeping of a captured step's generators, with generators that count: a graph's own need a device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from fastadv.engine.capture.streams import Streams
from fastadv.engine.safety import rng
from fastadv.engine.safety.dropout import Draws

CPU = torch.device("cpu")


class State:
    """What a generator draws next: `offset` says how much it has drawn."""

    def __init__(self, seed: int = 0, offset: int = 0) -> None:
        self.seed, self.offset = seed, offset


class Counting:
    """As torch's generators of a CUDA device: several can share a state, and the default one can take another's."""

    device = "cpu"

    def __init__(self, state: State) -> None:
        self.state = state

    def draw(self, count: int) -> list[tuple[int, int]]:
        self.state.offset += count
        return [(self.state.seed, self.state.offset - count + i) for i in range(count)]

    def graphsafe_get_state(self) -> Counting:
        return Counting(self.state)

    def graphsafe_set_state(self, other: Counting) -> None:
        self.state = other.state

    def clone_state(self) -> Counting:
        return Counting(State(self.state.seed, self.state.offset))

    def get_state(self) -> torch.Tensor:
        return torch.tensor([self.state.seed, self.state.offset]).view(torch.uint8)

    def set_state(self, state: torch.Tensor) -> None:
        self.state.seed, self.state.offset = state.view(torch.int64).tolist()

    def manual_seed(self, seed: int) -> None:
        self.state.seed, self.state.offset = seed, 0


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """The device's default generator, which `rng` saves, seeds and puts back."""
    generator = Counting(State(seed=3))

    @contextlib.contextmanager
    def seeded(seed: int, device: torch.device) -> Iterator[None]:
        before = generator.get_state()
        generator.manual_seed(seed)
        yield
        generator.set_state(before)

    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(rng, "save", lambda device: generator.get_state())
    monkeypatch.setattr(rng, "restore", lambda state, device: generator.set_state(state))
    monkeypatch.setattr(rng, "_Seeded", seeded)
    return generator


Run = Callable[[], list[Any]]


def run_of(default: Counting, steps: int, before: int, starts: int) -> Run:
    """A function that draws, and then makes steps of three passes with dropout="same" from random starts."""

    def run() -> list[Any]:
        seen: list[Any] = [default.draw(before)]
        for _ in range(steps):
            seed = rng.new_seed()
            with contextlib.ExitStack() as step:
                step.callback(rng.end_step)
                draws = Draws("same", CPU)
                draws.next_pass()
                first = default.draw(8)
                for index in range(starts):
                    with rng.apart(seed + index, CPU):
                        seen.append(default.draw(5))
                seen.append(first)
                for _ in range(2):
                    draws.next_pass()
                    seen.append(default.draw(8))
        return seen

    return run


@pytest.mark.parametrize("before", [0, 4])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("starts", [0, 2])
def test_a_replay_draws_what_the_run_draws(default: Counting, before: int, steps: int, starts: int) -> None:
    """Wherever the default generator stands by then; what the function draws first, and a second step, included."""
    run, streams = run_of(default, steps, before, starts), Streams(torch.device("cuda", 0))
    with rng.drawing_from(streams):
        for _ in range(2):
            streams.begin()
            run()
    registered: list[Any] = []
    streams.make(registered.append)
    assert len(registered) == steps * (2 + starts)
    for seed in (3, 11):
        found = []
        for replayed in (False, True):
            default.set_state(torch.tensor([seed, 400]).view(torch.uint8))
            torch.manual_seed(5)
            if replayed:
                streams.prepare(rng.new_seed)
                streams.capturing = True
                with rng.drawing_from(streams):
                    streams.begin()
                    drawn = run()  # a graph's replay draws the same from the same generators
                streams.capturing = False
            else:
                drawn = run()
            found.append((drawn, default.get_state().tolist()))
        assert found[0] == found[1]
