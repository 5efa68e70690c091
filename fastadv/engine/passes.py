"""The three verbs of a step. A method is a schedule of them.

descend  a full pass: accumulates the parameters' gradients, and leaves the perturbation's. `hold` is its first half,
         where the loss is made of several forwards
probe    computes the perturbation's gradient and nothing else; `partial` does so through the first layers alone
ascend   moves the perturbation up that gradient
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastadv.engine.frame import Backward, Closure, Frame, Pass
from fastadv.engine.loss import detached, loss_if_any, loss_of
from fastadv.engine.perturbation import Move, TablePerturbation
from fastadv.engine.rule import Rule
from fastadv.engine.split import NOT_ON_THE_WAY

__all__ = ["Backward", "Closure", "Engine", "Held", "Pass"]

REENTRANT = (
    "the model uses reentrant activation checkpointing, which cannot give the gradient of a perturbation: use "
    "checkpoint(..., use_reentrant=False), in transformers "
    "gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
)
NEVER_CALLED = (
    "the closure never ran the perturbed embedding ({names}). Does it run another model, or pass inputs_embeds? "
    "Was the model compiled and called before the method was made (make the method first)? Was the method closed?"
)
NO_GRADIENT = (
    "the last pass left no gradient at the perturbed embedding's output: the loss does not depend on it, or the "
    "function given as backward= ran no backward"
)
Loss = TypeVar("Loss", Tensor, Tensor | None)


class Held(NamedTuple):
    """One pass over the model whose backward is still to come."""

    loss: Tensor
    output: Any


class Engine(Frame):
    """Runs passes of one model with a perturbation at its embedding."""

    def start(self) -> None:
        """Put the perturbation at its start; where its shape is not known yet, as soon as it is."""
        calls, perturbation, draw, seed = self.site.calls, self.perturbation, self._draw, self._seed
        for call in calls:
            call.grad = None
        if draw is None:
            self.level()
            return
        before_any_pass = self.first is None
        self.site.started = lambda call: perturbation.start(draw, seed, call)
        if before_any_pass and (isinstance(perturbation, TablePerturbation) or self.site.masks_follow_ids()):
            calls.clear()  # what the start depends on is known only when the embedding is called
        for call in calls:
            self.site.started(call)

    def level(self) -> None:
        """Put the perturbation at zero; the gradient that the last pass left stays."""
        self.perturbation.reset()
        for call in self.site.calls:
            call.to_zero()

    # Full passes

    def descend(self, closure: Closure, weight: float = 1.0, *, more: bool = False) -> Pass:
        """A full pass. `more`: another full pass follows, so data parallelism need not reduce gradients yet."""
        return self._descend(closure, loss_of, weight, more=more)

    def descend_or_look(self, closure: Closure, weight: float = 1.0) -> Pass:
        """A clean pass before another, whose gradient no ascent follows: where the batch has no loss, only a look."""
        return self._descend(closure, loss_if_any, weight, more=True, paying=True)

    def _descend(
        self, closure: Closure, read: Callable[[Any], Loss], weight: float, *, more: bool, paying: bool = False
    ) -> Pass:
        with self.perturbation.watch(), self.wrapping.synchronised(not more):
            output, loss = self._full(closure, read, paying)
            self._hand_over(loss, weight)
        self._check_split()
        self.tables.collect(last=not more)
        return self._finish(output, loss)

    def hold(self, closure: Closure, read: Callable[[Any], Tensor] = loss_of) -> Held:
        """A full pass's forward, whose graph stays: the next `descend` is of a loss that is made of it too."""
        with self.wrapping.synchronised(False):
            output, loss = self._full(closure, read, paying=True)
        self.site.held = True
        self._finish(output, loss.mean())
        return Held(loss, output)

    def pay(self, closure: Closure) -> None:
        """Where the step owes a term that needs an unperturbed pass, and none could pay: that pass."""
        if self.proximity.owing:
            self.level()
            self._descend(closure, loss_of, 0.0, more=False, paying=True)

    def plain(self, closure: Closure, *, labelled: bool = True) -> Pass:
        """Plain training: the model as it is, no perturbation."""
        self.proximity.ask(closure, self.device)
        self.dropout.before_pass(self.device)
        output = closure()
        loss = loss_of(output) if labelled else loss_if_any(output)
        self.proximity.compare(output)
        self._hand_over(loss)
        return self._finish(output, loss)

    # Passes that leave every `.grad` as it is

    def probe(self, closure: Closure) -> Pass:
        """The perturbation's gradient alone."""
        self.site.probing = True  # autograd would compute the tables' gradients and throw them away
        with self._quiet():
            with self.precision.lowered(self.device):
                output, loss = self._forward(closure, loss_of)
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
            with self.precision.lowered(self.device):
                ends, weights = split.run(closure, whole=self.wrapping.sharded)
            self.site.recomputing = True  # what runs the embedding from here on is a checkpoint
            grads = self._gradients(ends, weights)
        if all(grad is None for grad in grads):
            raise RuntimeError(NOT_ON_THE_WAY.format(name=split.name))
        self.perturbation.take(grads)
        self.site.idle()

    def look(self, closure: Closure) -> Any:
        """The unperturbed model's output, without a gradient."""
        self.dropout.before_pass(self.device)
        with torch.no_grad():
            return closure()

    def slope(self, loss: Tensor) -> list[Tensor]:
        """The perturbation's gradient of a held loss, with a graph of its own; zeros where there is none."""
        leaves = self.perturbation.leaves()
        grads = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
        if all(grad is None for grad in grads):
            raise RuntimeError(NO_GRADIENT)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]

    def weight_gradients(self, closure: Closure, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradient of these parameters; no perturbation has part in it."""
        with self.wrapping.synchronised(False):
            with self.precision.lowered(self.device):
                output, loss = self._forward(closure, loss_of)
            grads = torch.autograd.grad(
                loss if self.scaler is None else self.scaler.scale(loss), parameters, allow_unused=True
            )
        self._finish(output, loss)
        return grads

    # The perturbation's steps

    def ascend(self, rule: Rule) -> None:
        """One step of the perturbation up the gradient that the last pass left."""
        self._check_gradient()
        self.perturbation.ascend(rule)

    def move(self, step: Move) -> None:
        """One step that is no ascent by a rule: delta <- step(call, delta, gradient), zero where a mask says so."""
        self._check_gradient()
        self.perturbation.move(step)

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

    def _full(self, closure: Closure, read: Callable[[Any], Loss], paying: bool) -> tuple[Any, Loss]:
        """The forward of a full pass; an unperturbed one may pay what is owed, if no ascent follows its gradient."""
        if paying:
            self.proximity.ask(closure, self.device)
        self.site.own = self.tables.own
        output, loss = self._forward(closure, read)
        if paying:
            self.proximity.compare(output)
        return output, loss

    def _forward(self, closure: Closure, read: Callable[[Any], Loss]) -> tuple[Any, Loss]:
        site = self.site
        self.dropout.before_pass(self.device)
        self._enter_pass()
        # Once, if no mask is given: this pass finds out the shape.
        with self.wrapping.eagerly(bool(self.modules) and not site.calls and not self.perturbation.in_place):
            output = closure()
        if site.live:
            self._check_calls()
        loss = read(output)
        site.recomputing = True  # what runs the embedding from here on is a checkpoint
        return output, loss

    def _enter_pass(self) -> None:
        if not self.perturbation.in_place:
            self.site.begin_pass()
        if self.split is not None:
            self.split.begin_pass()

    def _hand_over(self, loss: Tensor | None, weight: float = 1.0) -> None:
        """Give the loss, and what is owed besides, to whoever owns the backward."""
        if loss is not None and weight != 1:
            loss = loss * weight if weight else None
        total = self.proximity.joined(loss)
        if total is None:
            return
        if self.backward is not None:
            self.backward(total)
        elif self.scaler is not None:
            self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        else:
            total.backward()  # type: ignore[no-untyped-call]

    def _finish(self, output: Any, loss: Tensor | None) -> Pass:
        self.site.idle()
        loss = torch.zeros((), device=self.device) if loss is None else loss.detach()
        done = Pass(loss, detached(output))
        self.first = self.first or done
        return done

    # What a closure may have done wrong

    def _check_split(self) -> None:
        if self.split is not None:
            self.split.check()

    def _check_gradient(self) -> None:
        if not self.perturbation.has_gradient():
            raise RuntimeError(NO_GRADIENT)

    def _check_calls(self) -> None:
        site = self.site
        if not self.modules:
            return
        if site.cursor == 0:
            if site.without_grad:
                raise RuntimeError(f"the embedding ran under no_grad only. If {REENTRANT}")
            names = [name for name, part in self.model.named_modules() if any(part is m for m in self.modules)]
            raise RuntimeError(NEVER_CALLED.format(names=", ".join(names) or type(self.modules[0]).__name__))
        if any(call.delta.grad is not None for call in site.calls):
            raise RuntimeError("the closure called backward: it must only run the forward and return the loss")
        site.end_forward()
