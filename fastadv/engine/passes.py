"""The three verbs of a step. A method is a schedule of them.

descend  a full pass: accumulates the parameters' gradients, and leaves the perturbation's
probe    computes the perturbation's gradient and nothing else; `partial` does so through the first layers alone
ascend   moves the perturbation up that gradient
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from fastadv.engine import embedding as embeddings
from fastadv.engine import rng
from fastadv.engine.dropout import Dropout
from fastadv.engine.guard import Guard
from fastadv.engine.interception import install
from fastadv.engine.loss import detached, loss_of
from fastadv.engine.moved_tables import MovedTables
from fastadv.engine.perturbation import TABLE_SCOPES, Perturbation, PositionPerturbation, TablePerturbation
from fastadv.engine.rule import Rule
from fastadv.engine.site import Masks, Site
from fastadv.engine.split import NOT_ON_THE_WAY, Split, SplitChoice
from fastadv.engine.start import Draw
from fastadv.engine.table_gradients import TableGradients
from fastadv.engine.wrapping import Wrapping

Closure = Callable[[], Any]
Backward = Callable[[Tensor], Any]

REENTRANT = (
    "the model uses reentrant activation checkpointing, which cannot give the gradient of a perturbation: use "
    "checkpoint(..., use_reentrant=False), in transformers "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)
NEVER_CALLED = (
    "the closure never ran the perturbed embedding ({names}). Does it run another model, or pass inputs_embeds? "
    "Was the model compiled and called before the method was made (make the method first)? Was the method closed?"
)


class Pass(NamedTuple):
    """One pass over the model, detached."""

    loss: Tensor
    output: Any


class Engine:
    """Runs passes of one model with a perturbation at its embedding."""

    def __init__(
        self,
        model: nn.Module,
        *,
        embedding: embeddings.EmbeddingChoice,
        scope: str,
        dropout: str,
        tied: str,
        fused: bool | None,
        backward: Backward | None,
        scaler: GradScaler | None,
        atomic: bool,
    ) -> None:
        self.model = model
        self.modules = embeddings.find(model, embedding)
        self.wrapping = Wrapping(model)
        self.site = Site(self.modules, fused, by_row=scope in TABLE_SCOPES and not self.wrapping.compiled)
        self.perturbation = self._scoped(scope, tied)
        self.guard = Guard(model, atomic, fused)
        self.dropout = Dropout(dropout)
        self.backward = backward
        self._watched = backward is not None  # what the user wrote may look at gradients as soon as it has run
        self.scaler = scaler
        self.tables = TableGradients(self.site)
        self.split: Split | None = None
        self.first: Pass | None = None
        self._busy = False
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
        """Where the model is."""
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
        device = self.device
        try:
            with self.guard(device), rng.step(), self.dropout.step(self.model):
                self.site.begin(masks)
                self.perturbation.begin()
                self.tables.begin(watched=self._watched or self.wrapping.reduces())
                self._draw, self._seed = start, rng.new_seed() if start is not None and start.random else 0
                yield
        finally:
            self._busy, self.first = False, None
            self.site.idle()
            if self.split is not None:
                self.split.begin_pass()  # holds nothing between steps
            if self.perturbation.in_place:
                self.perturbation.reset()

    # The verbs

    def start(self) -> None:
        """Put the perturbation at its start; where its shape is not known yet, as soon as it is."""
        calls, perturbation, draw, seed = self.site.calls, self.perturbation, self._draw, self._seed
        for call in calls:
            call.grad = None
        if draw is None:
            perturbation.reset()
            for call in calls:
                call.to_zero()
            return
        before_any_pass = self.first is None
        self.site.started = lambda call: perturbation.start(draw, seed, call)
        if before_any_pass and (isinstance(perturbation, TablePerturbation) or self.site.masks_follow_ids()):
            calls.clear()  # what the start depends on is known only when the embedding is called
        for call in calls:
            self.site.started(call)

    def descend(self, closure: Closure, weight: float = 1.0, *, more: bool = False) -> Pass:
        """A full pass. `more`: another full pass follows, so data parallelism need not reduce gradients yet."""
        self.site.own = self.tables.own
        with self.perturbation.watch(), self.wrapping.synchronised(not more):
            output, loss = self._forward(closure)
            self._hand_over(loss if weight == 1 else loss * weight)
        self._check_split()
        self.tables.collect(last=not more)
        return self._finish(output, loss)

    def plain(self, closure: Closure) -> Pass:
        """Plain training: the model as it is, no perturbation."""
        self.dropout.before_pass(self.device)
        output = closure()
        loss = loss_of(output)
        self._hand_over(loss)
        return self._finish(output, loss)

    def probe(self, closure: Closure) -> Pass:
        """The perturbation's gradient, and nothing in any `.grad`."""
        self.site.probing = True  # autograd would compute the tables' gradients and throw them away
        with self._quiet():
            output, loss = self._forward(closure)
            grads = self._gradients([loss if self.scaler is None else self.scaler.scale(loss)])
        self._check_split()
        self.perturbation.take(grads)
        return self._finish(output, loss)

    def partial(self, closure: Closure) -> None:
        """The perturbation's gradient through the layers up to the split, whose own gradient is the last pass's."""
        split = self.split
        assert split is not None
        self.site.probing = True
        with self._quiet():
            self.dropout.before_pass(self.device)
            self.site.begin_pass()
            ends, weights = split.run(closure, whole=self.wrapping.sharded)
            self.site.recomputing = True  # what runs the embedding from here on is a checkpoint
            grads = self._gradients(ends, weights)
        if all(grad is None for grad in grads):
            raise RuntimeError(NOT_ON_THE_WAY.format(name=split.name))
        self.perturbation.take(grads)
        self.site.idle()

    def ascend(self, rule: Rule) -> None:
        """One step of the perturbation up the gradient that the last pass left."""
        if not self.perturbation.has_gradient():
            raise RuntimeError(
                "the last pass left no gradient at the perturbed embedding's output: the loss does not depend on it, "
                "or the function given as backward= ran no backward"
            )
        self.perturbation.ascend(rule)

    def apply(self) -> None:
        """From here to the end of the step, every forward sees the perturbation that was found."""
        self._enter_pass()
        self.site.searching = False

    # A pass

    @contextlib.contextmanager
    def _quiet(self) -> Iterator[None]:
        """For a backward that is about the perturbation alone."""
        with self.wrapping.synchronised(False), self.wrapping.frozen(self.perturbation.leaves):
            yield

    def _gradients(self, ends: Sequence[Tensor], weights: Sequence[Tensor] | None = None) -> Sequence[Tensor | None]:
        """Of the perturbation, and nothing else's."""
        try:
            return torch.autograd.grad(ends, self.perturbation.leaves(), weights, allow_unused=True)
        except RuntimeError as error:
            if "Checkpointing is not compatible" in str(error):
                raise RuntimeError(REENTRANT) from error
            raise

    def _forward(self, closure: Closure) -> tuple[Any, Tensor]:
        site = self.site
        self.dropout.before_pass(self.device)
        self._enter_pass()
        # Once, if no mask is given: this pass finds out the shape.
        with self.wrapping.eagerly(not site.calls and not self.perturbation.in_place):
            output = closure()
        if site.live:
            self._check_calls()
        loss = loss_of(output)
        site.recomputing = True  # what runs the embedding from here on is a checkpoint
        return output, loss

    def _enter_pass(self) -> None:
        if not self.perturbation.in_place:
            self.site.begin_pass()
        if self.split is not None:
            self.split.begin_pass()

    def _check_split(self) -> None:
        if self.split is not None:
            self.split.check()

    def _check_calls(self) -> None:
        site = self.site
        if site.cursor == 0:
            if site.without_grad:
                raise RuntimeError(f"the embedding ran under no_grad only. If {REENTRANT}")
            names = [name for name, part in self.model.named_modules() if any(part is m for m in self.modules)]
            raise RuntimeError(NEVER_CALLED.format(names=", ".join(names) or type(self.modules[0]).__name__))
        if any(call.delta.grad is not None for call in site.calls):
            raise RuntimeError("the closure called backward: it must only run the forward and return the loss")
        site.end_forward()

    def _hand_over(self, loss: Tensor) -> None:
        """Give the loss to whoever owns the backward."""
        if self.backward is not None:
            self.backward(loss)
        elif self.scaler is not None:
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        else:
            loss.backward()  # type: ignore[no-untyped-call]

    def _finish(self, output: Any, loss: Tensor) -> Pass:
        self.site.idle()
        done = Pass(loss.detach(), detached(output))
        self.first = self.first or done
        return done
