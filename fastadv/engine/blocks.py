"""The `at(mask)` blocks of one pass of a step: what a forward inside carries, and that one outside carries nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor

from fastadv.engine import at
from fastadv.engine.lookup import Lookup
from fastadv.engine.perturb.where import Where
from fastadv.engine.results import Reached
from fastadv.engine.safety import rng

if TYPE_CHECKING:
    from fastadv.engine.step import Step

REENTRANT = (
    "the model uses reentrant activation checkpointing, which cannot give the gradient of a perturbation: use "
    "checkpoint(..., use_reentrant=False), in transformers "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)


class Blocks:
    """Those of one pass.

    Attributes:
        where: of the block that is open.
        opened: whether there has been one.
    """

    def __init__(self, step: Step) -> None:
        self.step = step
        self.lookups = step.lookups
        self.where: Where | None = None
        self.opened = False
        self._calls = at.Calls(self.lookups.places.names, kept=True)
        self._reached = self._ran_without_grad = False

    def open(self, mask: Tensor) -> None:
        """One begins.

        Raises:
            RuntimeError: it is inside another one, or an earlier pass of the step had none.
            ValueError: a mask that does not fit the step's others, or `mask=` and `groups=` besides.
        """
        lookups = self.lookups
        if self.where is not None:
            raise RuntimeError(at.NESTED)
        if lookups.masks is not None or any(one is not None for one in lookups.documents):
            raise ValueError(at.WITH_MASK)
        self.opened = True
        if not lookups.under_at:
            if lookups.settled:
                raise RuntimeError(at.WITHOUT_FIRST)
            raise Reached  # the pass begins again
        first = lookups.texts is None
        self.where = lookups.where(mask, self.step.device)
        if first and self.step.engine.traced:  # a compiled graph would break on making a perturbation
            for old in lookups.lent:
                self._new_site(old.delta.detach(), old.module)

    def enter(
        self, like: Tensor, shape: Size, ids: Tensor | None, module: int, *, plain: bool, ended: bool
    ) -> Lookup | None:
        """The part of a site's perturbation that one call carries; None outside of the blocks."""
        where = self._calls.where(self.where, module, shape, ids, ended)
        if where is None:
            return None
        if torch.is_grad_enabled():
            self._reached = True
        else:
            self._ran_without_grad = True
        site = self.lookups.site(module)
        if site is None or not site.fits(_shape(where, shape), like.dtype, like.device, materialised=True):
            site = self._new_site(like.new_empty(0, shape[-1]), module)
        return where.of(site, shape, self.lookups.places.names[module], plain)

    def _new_site(self, like: Tensor, module: int) -> Lookup:
        texts = self.lookups.texts
        assert texts is not None
        shape = Size((*texts.there.shape, like.shape[-1]))
        self.step.new_lookup(len(self.lookups), shape, like, None, module, True)
        site = self.lookups.site(module)
        assert site is not None
        return site

    def check(self) -> None:
        """After the pass.

        Raises:
            RuntimeError: no forward inside of a block ran the perturbed modules, or in the step's first pass one of
                them.
        """
        names = self.lookups.places.names
        if not self._reached:
            reentrant = f"They ran under no_grad only. If {REENTRANT}. " if self._ran_without_grad else ""
            raise RuntimeError(at.NEVER_CALLED.format(names=", ".join(names), reentrant=reentrant))
        ran = self._calls.sites()
        missing = [name for index, name in enumerate(names) if index not in ran]
        if missing and not self.lookups.settled and not self.step.engine.traced:
            raise RuntimeError(at.NEVER_CALLED.format(names=", ".join(missing), reentrant=""))
        self.lookups.settled = True


def _shape(where: Where, shape: Size) -> Size:
    return Size((*where.there.shape, shape[-1]))


def begin_again(step: Step, under_at: bool) -> None:
    """A first pass has begun on a wrong assumption, whether the closure uses `at`: as if nothing had run.

    Raises:
        RuntimeError: the step is captured, so that its random numbers are counted.
    """
    if rng.recorded():
        raise RuntimeError(at.CAPTURED)
    step.engine.guard.rewind()
    if step.drawn_from() is not None:
        rng.new_seed()  # which has been drawn, and is kept
    step.engine.buffers.under_at = under_at
    step.lookups.turn(under_at)
