"""The frame of a step: what is perturbed, what is kept for a fault, and what a step begins and ends with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from fastadv.engine import embedding as embeddings
from fastadv.engine import rng
from fastadv.engine.dropout import Dropout
from fastadv.engine.guard import Guard
from fastadv.engine.interception import install
from fastadv.engine.moved_tables import MovedTables
from fastadv.engine.perturbation import TABLE_SCOPES, Perturbation, PositionPerturbation, TablePerturbation
from fastadv.engine.precision import Precision
from fastadv.engine.proximity import Proximity
from fastadv.engine.site import Masks, Site
from fastadv.engine.split import Split, SplitChoice
from fastadv.engine.start import Draw
from fastadv.engine.table_gradients import TableGradients
from fastadv.engine.wrapping import Wrapping

Closure = Callable[[], Any]
Backward = Callable[[Tensor], Any]


class Pass(NamedTuple):
    """One pass over the model, detached."""

    loss: Tensor
    output: Any


class Frame:
    """One model, the modules at which it is perturbed (none, where weights are), and the step that is running."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dropout: str,
        fused: bool | None,
        backward: Backward | None,
        scaler: GradScaler | None,
        atomic: bool,
        probe_dtype: torch.dtype | None,
        embedding: embeddings.EmbeddingChoice = None,
        scope: str = "sample",
        tied: str = "lookup",
        perturbs: bool = True,
    ) -> None:
        self.model = model
        self.modules = embeddings.find(model, embedding) if perturbs else []
        self.wrapping = Wrapping(model)
        self.site = Site(self.modules, fused, by_row=scope in TABLE_SCOPES and not self.wrapping.compiled)
        self.perturbation = self._scoped(scope, tied)
        self.guard = Guard(model, atomic, fused)
        self.dropout = Dropout(dropout)
        self.backward = backward
        self._watched = backward is not None  # what the user wrote may look at gradients as soon as it has run
        self.scaler = scaler
        self.precision = Precision(model, probe_dtype)
        self.tables = TableGradients(self.site)
        self.proximity = Proximity(self.dropout)
        self.split: Split | None = None
        self.first: Pass | None = None
        self.share = 1.0  # of an optimizer step that one batch is; terms that methods add are multiplied with it
        self._busy = False
        self._device: torch.device | None = None  # while a step runs
        self._draw: Draw | None = None
        self._seed = 0
        entered = [] if self.perturbation.in_place else self.modules
        self._interceptions = [install(module, i, self.site) for i, module in enumerate(entered)]

    def _scoped(self, scope: str, tied: str) -> Perturbation:
        if scope not in TABLE_SCOPES:
            return PositionPerturbation(self.site, scope)
        if any(embeddings.vocabulary(module) is None for module in self.modules):
            raise ValueError(f"scope={scope!r} needs an nn.Embedding; for another module's output use scope='sample'")
        return MovedTables(self.site, scope) if tied == "both" else TablePerturbation(self.site, scope)

    def split_at(self, choice: SplitChoice) -> None:
        """From now on partial passes can be run, which end at the output of that module."""
        try:
            if self.perturbation.in_place:
                raise ValueError("tied='both' moves the output layer too, which a partial pass never reaches")
            self.split = Split(self.model, choice, self.site)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the interceptions out of the model."""
        for interception in self._interceptions:
            interception.remove()
        self._interceptions = []
        if self.split is not None:
            self.split.remove()

    @property
    def device(self) -> torch.device:
        """Where the model is; within a step it stays there."""
        if self._device is not None:
            return self._device
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def memory(self) -> list[Tensor]:
        """The buffers that serve from step to step."""
        rooms = [call.room for call in self.site.calls if call.room is not None]
        return [*(call.delta for call in self.site.calls), *rooms, *self.perturbation.memory()]

    # The frame of a step

    @contextlib.contextmanager
    def step(self, masks: Masks, start: Draw | None = None) -> Iterator[None]:
        """Everything inside is one step: it begins with no perturbation and, if it fails, leaves no trace.

        `start` is where `self.start()` will put the perturbation. Its seed is drawn now, before the state that
        dropout="same" replays, so that every step starts elsewhere.
        """
        if self._busy:
            raise RuntimeError("a step is already running: the closure must not call the method that calls it")
        self._busy = True
        self._device = device = self.device
        try:
            with self.guard(device), rng.step(), self.dropout.step(self.model):
                self.site.begin(masks)
                self.perturbation.begin()
                self.tables.begin(watched=self._watched or self.wrapping.reduces())
                self.proximity.begin()
                self._draw, self._seed = start, rng.new_seed() if start is not None and start.random else 0
                yield
        finally:
            self._busy, self._device, self.first = False, None, None
            self.site.held = False
            self.site.idle()
            if self.split is not None:
                self.split.begin_pass()  # holds nothing between steps
            if self.perturbation.in_place:
                self.perturbation.reset()
