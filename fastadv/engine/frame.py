"""Around one step: what it finds is written down, and put back if it fails. In one place, whatever the step did."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from fastadv.engine.profile import span
from fastadv.engine.safety import rng, surroundings
from fastadv.engine.safety.dropout import Draws, quieted
from fastadv.engine.safety.interrupts import Interrupts, insist, whole

if TYPE_CHECKING:
    from fastadv.engine.engine import Engine

Undo = Callable[[], None]


class Frame:
    """The beginning of one step, and its two ends.

    No part of a step needs to clean up when it fails: context managers inside may be left half way by an interrupt, and
    what they would have put back is put back here. What moves in place says so in `undo` before it moves.

    A step that is captured happens later: there is nothing to put back, or whoever captures does it.

    Attributes:
        undo: what leads back from changes that the guard does not know of. Each may be called several times.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.undo: list[Undo] = []
        self._interrupts = Interrupts()
        self._quiet: list[nn.Module] = []

    @whole
    def begin(self) -> Draws:
        """Write down what there is."""
        engine = self.engine
        self._interrupts.hold()
        around = surroundings.look(engine.inventory.device)
        self.undo += [lambda: surroundings.put_back(around), engine.remember(), engine.parallelism.remember()]
        if not rng.capturing():
            with span("guard"):
                self.undo += [engine.buffers.remember(), *engine.guard.put_back(engine.guard.save())]
        engine.busy = True
        self._quiet = quieted(engine.dropout, engine.inventory.modules)
        for module in self._quiet:
            module.training = False
        return Draws(engine.dropout, engine.inventory.device)

    def hear(self) -> None:
        """An interrupt that has waited comes now: while other processes still wait to hear whether all is well."""
        self._interrupts.hand_on()

    @whole
    def end(self) -> None:
        """The step is done. An interrupt that came meanwhile is heard, and the step is undone."""
        self._leave()
        self._interrupts.release()

    @whole
    def roll_back(self) -> None:
        """The step has failed: everything is what it was. May be called again.

        Raises:
            Whatever struck meanwhile, in the end.
        """
        struck = insist((self._interrupts.hold, *reversed(self.undo), self._leave, self._interrupts.release))
        if struck is not None:
            raise struck

    def _leave(self) -> None:
        for module in self._quiet:
            module.training = True
        rng.end_step()
        self.engine.parallelism.leave()
        self.engine.entrance.forward = None
        self.engine.busy = False
