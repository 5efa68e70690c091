"""`with adv.at(mask):`: which positions of the forwards inside carry the perturbation."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Size, Tensor

from fastadv.engine.lookup import is_same
from fastadv.engine.model import checkpoints
from fastadv.engine.perturb.where import Where
from fastadv.engine.safety.interrupts import whole

if TYPE_CHECKING:
    from fastadv.engine.engine import Engine

NESTED = (
    "at(mask) inside at(mask): one block says where the forwards inside carry the perturbation; close it before the "
    "next one, or let `applied()` without a mask hold the perturbation"
)
OF_WORDS = (
    "at(mask) gives the n-th position of a sample its n-th vector, and scopes 'table' and 'row' have one a word: "
    "use scope='token', 'sample' or 'batch'"
)
PARTS = (
    "at(mask) counts the positions of whole samples, and with process_group= a rank has a part of each: give one of "
    "the two"
)
CLAMPED = (
    "clamp='batch' takes the range of the one text that is perturbed, and under at(mask) there may be several: leave "
    "one of the two out"
)
PARTIAL = (
    "at(mask) may hold several forwards, and a partial pass ends in the first of them: use fastadv.PGD, whose probes "
    "run them all"
)
WITH_MASK = "at(mask) says where the perturbation lies: leave mask= and groups= out of the call whose closure uses it"
WITHOUT_FIRST = (
    "an earlier pass of this step ran a closure that perturbs whole forwards, and this one says at(mask): use at(mask) "
    "in the closure of the loss and in that of the attack"
)
CAPTURED = "a step that is captured has to know that its closure uses at(mask): run the same step before capture()"
NEVER_CALLED = (
    "no forward inside at(mask) ran {names}, where the perturbation enters. {reentrant}Run the model's forward inside "
    "the block, and name modules that this forward calls"
)
WHICH = (
    "activation checkpointing recomputes a perturbed module ({name}), and whether it ran under at(mask), and under "
    "which, cannot be told: use checkpoint(..., use_reentrant=False), not one inside another, in transformers "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={{'use_reentrant': False}})"
)


class At:
    """The block. Where no pass runs and nothing is applied, it changes nothing: the model is the plain one.

    Raises:
        ValueError: options of the method that go without.
    """

    def __init__(self, engine: Engine, mask: Tensor) -> None:
        refusals = {OF_WORDS: engine.of_tables, PARTS: engine.ranks is not None, CLAMPED: engine.places.clamps}
        for why, refused in refusals.items():
            if refused:
                raise ValueError(why)
        self._engine, self._mask = engine, mask
        self._inside: Any = None

    def __enter__(self) -> None:
        self._inside = forward = self._engine.entrance.forward
        if forward is not None:
            forward.open(self._mask)

    @whole
    def __exit__(self, *_: object) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.close()


class Call(NamedTuple):
    """One call of a site, as a recomputation may ask for it."""

    site: int
    shape: Size
    ids: Tensor | None
    where: Where | None  # None: outside of every block


class Calls:
    """The calls of one pass, or of one `applied` block: what ran under which `at`.

    Args:
        names: of the sites.
        kept: whether every call is, and not those in checkpoints alone: for a pass, which has an end.
    """

    def __init__(self, names: Sequence[str], *, kept: bool) -> None:
        self.names = names
        self._kept = kept
        self._every: list[Call] = []
        self._frames: weakref.WeakKeyDictionary[Any, dict[int, Call]] = weakref.WeakKeyDictionary()

    def where(self, where: Where | None, site: int, shape: Size, ids: Tensor | None, ended: bool) -> Where | None:
        """Where the call that happens now carries the perturbation: as it does in the block, or as it did.

        Args:
            where: of the block that is open.
            site: which of the perturbed places it is.
            shape: of its result.
            ids: what it looks up.
            ended: the pass is over, so that a checkpoint recomputes the call.

        Raises:
            RuntimeError: a recomputed call, which cannot be told from others.
        """
        if torch.compiler.is_compiling():
            return where
        here = checkpoints.here()
        if not (here.again or ended or checkpoints.in_backward()):
            self._note(Call(site, shape, ids, where), here.frame)
            return where
        known = None if here.frame is None else self._frames.get(here.frame, {}).get(site)
        return self._like(site, shape, ids) if known is None else known.where

    def sites(self) -> set[int]:
        """Those that ran inside a block."""
        return {call.site for call in self._every if call.where is not None}

    def _note(self, call: Call, frame: Any) -> None:
        if self._kept:
            self._every.append(call)
        if frame is None:
            return
        before = self._frames.setdefault(frame, {}).setdefault(call.site, call)
        if before.where is not call.where:  # a block inside of a checkpoint
            raise RuntimeError(WHICH.format(name=self.names[call.site]))

    def _like(self, site: int, shape: Size, ids: Tensor | None) -> Where | None:
        alike = [call for call in self._every if call.site == site and call.shape == shape]
        same = [call for call in alike if ids is not None and call.ids is not None and is_same(call.ids, ids)]
        found = same or alike
        if not found or any(call.where is not found[0].where for call in found):
            raise RuntimeError(WHICH.format(name=self.names[site]))
        return found[0].where
