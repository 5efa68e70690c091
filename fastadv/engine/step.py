"""One adversarial step, made for one `backward` or `find` and then thrown away. A method is a schedule of its verbs.

forward   a pass whose graph waits for `backward`
backward  accumulates the parameters' gradients, and keeps the perturbation's
descend   forward and backward: a full pass
probe     computes the perturbation's gradient and nothing else; `partial` does so through the first layers alone
ascend    moves the perturbation up that gradient
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Size, Tensor

from fastadv.engine import partial
from fastadv.engine.forward import NO_GRADIENT, Forward, Kind, differentiate
from fastadv.engine.lookups import Lookups, Masks
from fastadv.engine.model.split import Crossing
from fastadv.engine.model.table_gradients import TableGradients
from fastadv.engine.outputs import detached, loss_of
from fastadv.engine.owner import Around, scaled
from fastadv.engine.perturb.documents import Groups
from fastadv.engine.perturb.perturbation import Move
from fastadv.engine.perturb.rows import RowPerturbation
from fastadv.engine.perturb.rule import Rule
from fastadv.engine.perturb.start import Draw
from fastadv.engine.profile import span
from fastadv.engine.results import Closure, Pass, StepResult
from fastadv.engine.safety import rng
from fastadv.engine.safety.watched import Watched
from fastadv.engine.scout import find_shape, needs_shape

if TYPE_CHECKING:
    from fastadv.engine.engine import Engine
    from fastadv.engine.frame import Frame


class Step:
    """The state of one step of one model, and the verbs that a method's `run` and `search` are written in.

    Attributes:
        closure: the user's; runs the model and returns a loss, or an output that has one.
        lookups: the calls of the perturbed modules.
        perturbation: what moves their outputs.
        first: the first pass, detached.
        undo: what leads back from changes that a method makes in place, should the step fail.
        waiting: whether a clean forward's graph waits for a later backward.
        share: what terms that a method adds are multiplied with, so that they count as much as this batch does.
    """

    def __init__(
        self,
        engine: Engine,
        frame: Frame,
        closure: Closure,
        masks: Masks,
        groups: Groups,
        attack: Closure | None,
        start: Draw | None,
    ) -> None:
        self.draws = draws = frame.begin()
        self.undo = frame.undo
        self.call = Watched(engine.inventory, engine.parallelism)
        self.closure = closure
        self.engine = engine
        self.device = draws.device
        self.share = engine.term_factor()
        self._around = Around(frame.undo)
        self.lookups = Lookups(engine.places, masks, groups, engine.buffers.lookups, engine.buffers.under_at)
        self.perturbation = engine.new_perturbation(self.lookups)
        self.tables = TableGradients(self.lookups, watched=engine.watched or engine.traced)
        self.first: Pass | None = None
        self.waiting = False
        self._term = None if engine.new_term is None else engine.new_term(self)
        self._target, self._evaluated = attack, engine.attack_mode == "eval"
        self._start, self._seed = start, rng.new_seed() if start is not None and start.random else 0
        self._started = self._followed = False  # where ascents begin; they may follow the last pass's gradient
        self._pending: Forward | None = None  # the forward that the next backward goes through
        self.crossing: Crossing | None = None  # of the split, in the last pass that brought a gradient there

    # Where the perturbation begins, and what it maximises

    @property
    def target(self) -> Closure:
        """The closure whose value ascents maximise."""
        return self.closure if self._target is None else self._target

    def maximise(self, target: Closure) -> None:
        """Ascend `target` instead of the closure's loss, unless the user gave an `attack`."""
        if self._target is None:
            self._target = target

    def start(self) -> None:
        """Put the perturbation at its start; where its shape is not known yet, as soon as it is."""
        self._started, self._followed = True, False
        self.perturbation.begin()
        if self.waiting and self.engine.traced:
            self.lookups.renew()  # a compiled graph may hold what its compiler chose to compute again in its backward
        if self._start is None:
            self.perturbation.zero_()
            return
        if self.first is None and (isinstance(self.perturbation, RowPerturbation) or self.lookups.masks_follow_ids()):
            self.lookups.items.clear()  # what the start depends on is known only when the embedding is called
        with span("start"):
            for lookup in self.lookups:
                self.perturbation.start(self._start, self._seed, lookup)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def new_lookup(
        self, index: int, shape: Size, like: Tensor, ids: Tensor | None, module: int, materialised: bool
    ) -> None:
        """A forward has met a call that no earlier one made: give it a perturbation, at its start."""
        lookup = self.lookups.add(index, shape, like, ids, module, materialised)
        if self._started and self._start is not None:
            self.perturbation.start(self._start, self._seed, lookup)

    def drawn_from(self) -> int | None:
        """The seed of a random start; None: nothing is drawn."""
        return self._seed if self._start is not None and self._start.random else None

    # Full passes

    def forward(
        self,
        closure: Closure | None = None,
        *,
        read: Callable[[Any], Any] = loss_of,
        last: bool = True,
        clean: bool = False,
    ) -> Pass:
        """The forward of a full pass, whose graph waits for `backward`.

        Args:
            closure: in place of the step's.
            read: takes the loss out of what the closure returns; None from it: a batch without a loss.
            last: no other full pass of the method follows, so gradients are reduced in this one's backward.
            clean: there is no perturbation yet, and no ascent follows this pass's gradient. Without a `backward` of its
                own, its graph waits for that of a later pass.
        """
        closure = self.closure if closure is None else closure
        term = self._term if clean else None
        if term is not None:
            term.ask(closure)
        last = last and (clean or self._term is None or not self._term.owing)  # otherwise `finish` has a pass to come
        self._around.enter(self.engine.owner.sync(last))
        with self.engine.parallelism.synchronised(last):
            output, loss = self._run("full", closure, read, last=last)
        if term is not None:
            term.compare(output)
        self.waiting = self.waiting or clean
        return Pass(loss, output)

    def backward(self, loss: Tensor | None, weight: float = 1.0) -> None:
        """Accumulate the gradient of `weight * loss`, through the last forward and all that wait."""
        forward = cast(Forward, self._pending)
        with self.perturbation.collecting(), forward.backward():
            self._hand_over(loss, weight, forward.last)
        self._around.leave()
        self.tables.collect()
        self._followed = self._target is None and not self._evaluated and (self._started or self._start is None)

    def descend(
        self,
        weight: float = 1.0,
        *,
        closure: Closure | None = None,
        read: Callable[[Any], Any] = loss_of,
        last: bool = True,
        clean: bool = False,
    ) -> Pass:
        """A full pass, forward and backward, whose loss counts `weight`; see `forward`. Detached."""
        first, waiting = self.first is None, self.waiting
        loss, output = self.forward(closure, read=read, last=last, clean=clean)
        self.waiting = waiting
        self.backward(loss, weight)
        return self.first if first and self.first is not None else self._detached(loss, output)

    def plain(self, read: Callable[[Any], Tensor | None] = loss_of) -> Pass:
        """Plain training: a full pass of the model as it is, no perturbation."""
        if self._term is not None:
            self._term.ask(self.closure)
        self.draws.next_pass()
        with self._around.one(self.engine.owner.sync(True)):
            with self.engine.parallelism.synchronised(True), span("forward"):
                output = self.call(self.closure)
            loss = read(output)
            if self._term is not None:
                self._term.compare(output)
            with span("backward"):
                self._hand_over(loss)
        self.first = self._detached(loss, output)
        return self.first

    def finish(self) -> None:
        """After the method's last pass: pay the term that no pass could, and add up the tables' gradients."""
        if self._term is not None and self._term.owing:
            self.perturbation.zero_()
            self.descend(0.0, clean=True)
        with span("table_gradient"):
            self.tables.flush()

    def settle(self) -> None:
        """At the very end: what has moved in place is put back, and no pass is kept, so that the step can be freed."""
        self._around.leave()  # of a forward that no backward has followed
        self.perturbation.settle()
        self._pending = None

    def result(self, clean: Pass | None, adversarial: Pass) -> StepResult:
        """The step's figures, from its clean pass (if there was one) and its last."""
        output = (self.first or adversarial).output
        return StepResult((clean or adversarial).loss.detach(), adversarial.loss.detach(), output)

    # Passes that leave every `.grad` as it is

    def probe(self, target: Closure | None = None) -> Tensor:
        """Compute the perturbation's gradient of `target` alone, and return its value."""
        with self.probing(), self.engine.parallelism.quiet(self.perturbation.leaves):
            with self.engine.probe_autocast.lowered(self.device):
                _, loss = self._run("probe", self.target if target is None else target, loss_of)
            with cast(Forward, self._pending).backward():
                grads = differentiate([scaled(self.engine.owner, loss)], self.perturbation.leaves())
        self.perturbation.take(grads)
        self._followed = True
        return cast(Tensor, loss.detach())

    def probing(self) -> contextlib.AbstractContextManager[None]:
        """Around what a method differentiates by itself."""
        return self._around.one(self.engine.probing())

    def partial(self) -> None:
        """The perturbation's gradient through the layers up to the split, whose own gradient is the last pass's."""
        with self.probing(), self.engine.parallelism.quiet(self.perturbation.leaves):
            grads = partial.gradients(self)
        self.perturbation.take(grads)

    def gradients_by(self, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradient of the target by weights that a method moves, and by nothing else."""
        engine = self.engine
        with self.probing():
            with engine.probe_autocast.lowered(self.device), engine.parallelism.synchronised(False):
                _, loss = self._run("full", self.target, loss_of)
            with span("backward"):
                return differentiate([scaled(engine.owner, loss)], weights)

    def look(self) -> Any:
        """The unperturbed model's output, without a gradient."""
        self.draws.next_pass()
        with torch.no_grad(), span("forward"):
            return self.call(self.closure)

    # The perturbation's steps

    def ascend(self, rule: Rule) -> None:
        """One step up the last gradient, then onto the ball. A first ascent begins with the gradient at the start."""
        self._lead()
        with span("ascend"):
            self.perturbation.ascend(rule)

    def move(self, step: Move) -> None:
        """One step that no rule describes: delta <- step(index, delta, gradient), zero where a mask says so."""
        self._lead()
        with span("ascend"):
            self.perturbation.move(step)

    def _lead(self) -> None:
        """See to a gradient: the last pass's, or, where no ascent may follow that, a probe's at the start."""
        if not self._followed:
            if not self._started:
                self.start()
            self.probe()
        self._started = True
        if not self.perturbation.has_gradient():
            raise RuntimeError(NO_GRADIENT)

    # A pass

    def _run(self, kind: Kind, closure: Closure, read: Callable[[Any], Any], *, last: bool = False) -> tuple[Any, Any]:
        """One forward with the perturbation in it: the closure's output and its loss."""
        split = self.engine.split
        self._pending = forward = Forward(self, kind, None if split is None else Crossing(split.name), last)
        output, loss = forward.run(closure, read, eager=needs_shape(self) and not find_shape(self, closure))
        self.first = self.first or self._detached(loss, output)
        return output, loss

    def _hand_over(self, loss: Tensor | None, weight: float = 1.0, last: bool = True) -> None:
        """Give the loss, and a term that joins it, to the owner of the backward."""
        if loss is not None and weight != 1:
            loss = loss * weight if weight else None
        total = loss if self._term is None else self._term.joined(loss)
        if total is not None:
            with self.engine.agreement.reduction(total, last):
                self.engine.owner.backward(total, last)

    def _detached(self, loss: Tensor | None, output: Any) -> Pass:
        value = torch.zeros((), device=self.device) if loss is None else loss.detach()
        return Pass(value.mean() if value.dim() else value, detached(output))
