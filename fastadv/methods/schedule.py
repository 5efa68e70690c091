"""Which steps of a training are attacked, and how many were."""

from __future__ import annotations

from collections.abc import Callable

from fastadv.methods.options import whole


class Schedule:
    """From `start_step` on, each `every` steps; the others are plain training."""

    def __init__(self, start_step: int, every: int) -> None:
        self.start_step = whole("start_step", start_step, 0)
        self.every = whole("every", every, 1)
        self.calls = 0
        self.attacked = 0
        self.now = 0  # the step that is running, or ran last

    def enter(self, step: int | None) -> bool:
        """Go to a step, by default the next one. Returns whether it is attacked."""
        self.now = self.calls if step is None else step
        return self.now >= self.start_step and (self.now - self.start_step) % self.every == 0

    def remember(self) -> Callable[[], None]:
        """Return what takes the count back to here."""
        calls, attacked = self.calls, self.attacked

        def put_back() -> None:
            self.calls, self.attacked = calls, attacked

        return put_back

    def count(self, attacked: bool) -> None:
        """The step is done."""
        self.calls += 1
        self.attacked += attacked
