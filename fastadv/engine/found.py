"""A perturbation as a value: found once, held, and applied to as many forwards as one likes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Size, Tensor

from fastadv.engine import at
from fastadv.engine.forward import APPLIED
from fastadv.engine.lookup import Lookup, is_same
from fastadv.engine.lookups import Places
from fastadv.engine.perturb.moved_table import MovedTable
from fastadv.engine.perturb.rows import RowPerturbation
from fastadv.engine.perturb.tied_tables import TiedTables
from fastadv.engine.perturb.where import Texts, Where
from fastadv.engine.safety.interrupts import Block

if TYPE_CHECKING:
    from fastadv.engine.engine import Engine
    from fastadv.engine.model.placed import Placed
    from fastadv.engine.model.split import Crossing
    from fastadv.engine.step import Step

OTHER_SHAPE = (
    "no perturbation was found for an embedding call of shape {shape}: inside `applied`, run the model on the batch "
    "that the closure ran it on ({found})"
)
OTHER_IDS = (
    "this batch has other token ids than the one that the perturbation was found for: inside `applied`, run the model "
    "on the batch that the closure ran it on, or find a perturbation for this one"
)
OF_FORWARDS = (
    "this perturbation was found for whole forwards, [B, T, D] of each, and at(mask) is for one that was found in a "
    "closure that used it: `with adv.at(mask):` around the forwards of the closure that is given to find"
)
OTHER_SITE = (
    "no perturbation was found for {name} with an output of {shape}: inside `applied`, run the model that the closure "
    "ran, in the same dtype"
)
CLOSED = "the method was closed, so that nothing can be applied to its model: find and apply before close()"


class Found:
    """The perturbation of one batch, as `find` returns it. It owns its memory, and holds no graph.

    Attributes:
        values: the perturbations, detached: [B, T, D] per call of the embedding in position scopes, [R, D] with a row
            per distinct token id in table scopes. Where the closure used `at(mask)`: [B, N, D] per site, N the largest
            number of positions of a sample, zero where a sample has fewer.
        sites: the names of the modules that `values` are added to, one each; of table scopes all of them.
    """

    def __init__(self, engine: Engine, step: Step) -> None:
        self._engine = engine
        self._texts = step.lookups.texts
        self._lookups = [_held(lookup) for lookup in step.lookups]
        self.values, self._tables = _values(step, self._lookups)
        if isinstance(step.perturbation, RowPerturbation) and self.values:
            for lookup in self._lookups:
                lookup.rows = self.values[0]
        self.sites: list[str] = [engine.places.names[lookup.module] for lookup in self._lookups]

    def applied(self, mask: Tensor | None = None) -> contextlib.AbstractContextManager[None]:
        """Let every forward inside the block see the perturbation, for as long as you like.

        A perturbation that was found under `at(mask)` lies where a mask says: this one, for all forwards inside, or
        that of an `adv.at(mask)` block inside. The text may be another, of another length and padding side, with as
        many positions of each sample. Forwards outside of `at` are the plain model's.

        With gradients or without, and with optimizer steps in between. Outside of the block the model is the plain one.
        Run backward inside as well where activation checkpointing recomputes the embedding. On CUDA, ids in other
        memory than those of the search are compared, which synchronises.

        Args:
            mask: [B, T], true or 1 where the forwards inside carry it; only for what was found under `at`.

        Raises:
            RuntimeError: another perturbation is applied, or the method was closed. Inside: the model runs on another
                batch than the one this was found for.
            ValueError: a mask for a perturbation of whole forwards, or one with other numbers of positions.

        Examples:
            >>> found = adv.find(lambda: model(ids, labels=labels).loss)  # doctest: +SKIP
            >>> with found.applied():  # doctest: +SKIP
            ...     logits = model(ids).logits
        """
        if mask is not None and self._texts is None:
            raise ValueError(OF_FORWARDS)
        return _Application(self, mask)


class _Application(Block):
    """One `applied` block."""

    def __init__(self, found: Found, mask: Tensor | None) -> None:
        self._engine = engine = found._engine
        self._tables = [MovedTable(table, value, rows) for table, value, rows in found._tables]
        self._forward = Applied(found._lookups, engine.places, found._texts) if engine.enters else None
        super().__init__(self._begin, self._end)
        if mask is not None and self._forward is not None:
            self._forward.open(mask)

    def __enter__(self) -> None:
        if self._engine.entrance.forward is not None:
            raise RuntimeError(APPLIED)
        if self._engine.closed:
            raise RuntimeError(CLOSED)
        super().__enter__()

    def _begin(self) -> None:
        for table in self._tables:
            table.move()
        self._engine.entrance.forward = self._forward

    def _end(self) -> None:
        self._engine.entrance.forward = None
        for table in self._tables:
            table.put_back()


class Applied:
    """The forwards inside an `applied` block, as hooks see them: each call gets the perturbation found for it."""

    def __init__(self, lookups: Sequence[Lookup], places: Places, texts: Texts | None) -> None:
        self.lookups = lookups
        self.fused = places.fused
        self.crossing: Crossing | None = None
        self.ended = False
        self._places = places
        self._texts = texts
        self._where: Where | None = None  # of the `at` block that is open
        self._calls = at.Calls(places.names, kept=False)
        self.cursor = 0

    def open(self, mask: Tensor) -> None:
        """See `Perturbing`.

        Raises:
            RuntimeError: it is inside another one, or what is applied was found for whole forwards.
        """
        if self._where is not None:
            raise RuntimeError(at.NESTED)
        if self._texts is None:
            raise RuntimeError(OF_FORWARDS)
        self._where = self._texts.where(mask)

    def close(self) -> None:
        """See `Perturbing`."""
        self._where = None

    def enter(self, like: Tensor, shape: Size, ids: Tensor | None, module: int, plain: bool = False) -> Lookup | None:
        """The next lookup in call order, of this module, shape and ids; under `at` that of the site."""
        if self._texts is not None:
            return self._under_at(like, shape, ids, module, plain)
        return self._next(like, shape, ids, module, plain)

    def _under_at(self, like: Tensor, shape: Size, ids: Tensor | None, module: int, plain: bool) -> Lookup | None:
        where = self._calls.where(self._where, module, shape, ids, ended=False)
        if where is None:
            return None
        site = next((lookup for lookup in self.lookups if lookup.module == module), None)
        size = Size((*where.there.shape, shape[-1]))
        if site is None or not site.fits(size, like.dtype, like.device, materialised=True):
            raise RuntimeError(OTHER_SITE.format(name=self._places.names[module], shape=tuple(shape)))
        return where.of(site, shape, self._places.names[module], plain)

    def _next(self, like: Tensor, shape: Size, ids: Tensor | None, module: int, plain: bool) -> Lookup:
        materialised = not (plain and self._places.by_row)
        count = len(self.lookups)
        seen = False
        for turn in range(count):
            index = (self.cursor + turn) % count
            lookup = self.lookups[index]
            if lookup.module != module or not lookup.fits(shape, like.dtype, like.device, materialised):
                continue
            if torch.compiler.is_compiling() or _same_batch(lookup, ids):
                self.cursor = index + 1
                return lookup
            seen = True
        shapes = ", ".join(str(tuple(lookup.delta.shape)) for lookup in self.lookups)
        raise RuntimeError(OTHER_IDS if seen else OTHER_SHAPE.format(shape=tuple(shape), found=shapes))

    def detaches(self, lookup: Lookup, table: Tensor) -> bool:  # noqa: ARG002
        """Never: the table is trained as in any forward."""
        return False

    def place(self, placed: Placed) -> None:
        """The search has seen to that."""

    def divide(self, module: int, *, has_ids: bool) -> None:
        """The search has seen to that."""


def _same_batch(lookup: Lookup, ids: Tensor | None) -> bool:
    if lookup.ids is None or ids is None:
        return True
    return is_same(lookup.ids, ids) or torch.equal(lookup.ids, ids)


def _held(lookup: Lookup) -> Lookup:
    """A copy of a lookup's perturbation and batch, without its part in the step."""
    ids = lookup.ids if lookup.first is None else lookup.first.copy
    return Lookup(
        lookup.delta.detach().clone() if lookup.materialised else lookup.delta.detach(),
        lookup.mask,
        lookup.documents,
        None if ids is None else ids.clone(),
        lookup.module,
        materialised=lookup.materialised,
        rows=lookup.rows,
        slot=lookup.slot,
    )


def _values(step: Step, held: list[Lookup]) -> tuple[list[Tensor], list[tuple[Tensor, Tensor, Tensor | None]]]:
    """The perturbations; and for tables that move in place: table, perturbation of its rows, which rows (None: all)."""
    if isinstance(step.perturbation, TiedTables):
        tables = [(one.table, one.perturbation(), one.rows) for one in step.perturbation.tables]
        moved = [(table, value, rows) for table, value, rows in tables if value is not None]
        return [value for _, value, _ in moved], moved
    if isinstance(step.perturbation, RowPerturbation):
        rows = step.perturbation.rows
        return ([] if rows is None else [rows.clone()]), []
    return [lookup.delta for lookup in held], []
