"""A step is done on all processes that train one model, or on none.

A process that fails leaves the others waiting in an all-reduce that nobody answers or, worse, that its next step's
answers. So they ask each other whether all is well before a backward that reduces gradients, and at the step's end.
See docs/design/0017-a-step-of-all-processes.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from fastadv.engine.model.parallelism import Parallelism
from fastadv.engine.safety.ballot import FAILED, FINE, LOST, Ballot, Count, Verdict

END = 0  # the place after all reductions; before them it is the number of the next

VOID = (
    "rank {rank} failed in this step, or in a micro-batch before it, so that the step is void on all ranks: nothing "
    "was trained, and the model is as it was. Its own error says why; a next step may follow"
)
APART = (
    "the ranks are at different places of one step, so that it is void on all of them: start_step, every and step= "
    "must be the same on every rank"
)
LOST_STEP = (
    "the ranks have come apart, and no step can put them together: {why}. Gradients of different steps would be mixed, "
    "so that every further step is refused. Start all ranks anew, from a checkpoint"
)
IN_REDUCTION = "rank {rank} failed while gradients were reduced, or after the others were done with that step"
UNEQUAL = "they have not run the same steps, or not as many collectives in this one"
ABSENT = (
    "not every rank came to this step in time (one has fewer batches, skips one, or is gone). Give every rank "
    "as many batches, or train in torch's Join([ddp])"
)
MEAN_IN_JOIN = (
    "a rank that only shadows others in torch's Join cannot tell its gradient, by which the weights move here: under "
    "Join give AWP one step, no attack=, and no gradient accumulation"
)
IN_JOIN = "a step failed inside of torch's Join, which leaves this rank no way to tell the others"


class Agreement:
    """Of the processes that train one model. With one process, or where nothing is reduced, it does nothing.

    Args:
        parallelism: the model's wrappers.
        model: the model.
    """

    def __init__(self, parallelism: Parallelism, model: nn.Module) -> None:
        self._parallelism = parallelism
        self._model = model
        self._ballot: Ballot | None = None
        self._refusal = ""  # why no step can be run any more
        self.averages = False  # a method asks for the `mean` of gradients
        self._owed = FINE  # what this process has to say, and could not yet
        self._posted: Count | None = None  # of a step that failed: its votes may not be counted yet
        self._steps = 0  # that were agreed on
        self._issued = 0  # collectives, when this step began
        self._reductions = 0  # in this step
        self._trains = False  # this step
        self._running = False  # in a step that is agreed on
        self._over = False  # a verdict has ended it
        self._done = False  # on all processes
        self._reducing = False

    @contextlib.contextmanager
    def step(self, trains: bool) -> Iterator[None]:
        """Around one step, outside of what puts the model back.

        Raises:
            RuntimeError: an earlier step has left the processes apart.
        """
        parallelism = self._parallelism
        if not parallelism.among_others():
            yield
            return
        self._settle()
        if self._refusal:
            raise RuntimeError(self._refusal)
        self._trains = trains
        try:
            self._begin(trains)
            self._own_up()
            with contextlib.ExitStack() as stack:
                self._align(stack, trains)
                yield
        except BaseException:
            self._fail(trains)
            raise
        finally:
            self._trains = self._running = self._reducing = False

    def meet(self) -> None:
        """Before processes put together norms, which nobody begins unless all do.

        Raises:
            RuntimeError: another process failed.
        """
        if self._running:
            self._reductions += 1
            self._reach(self._reductions)

    @contextlib.contextmanager
    def reduction(self, loss: Tensor, last: bool) -> Iterator[None]:
        """Around a backward; where it reduces, as the `last` one does, nobody begins it unless all do.

        Raises:
            RuntimeError: another process failed.
        """
        self._parallelism.send(last)
        if not (last and self._running and self._parallelism.reduces_now()):
            yield
            return
        self._reductions += 1
        self._reach(self._reductions)
        self._reducing = True
        self._parallelism.prepare(loss)
        yield
        self._reducing = False

    def mean(self, gradients: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of this process's batch, which DDP has not reduced: their mean over all processes.

        A step that does not train has no others: there it is this process's own.

        Raises:
            RuntimeError: another process failed, or only shadows this one.
        """
        if not self._trains:
            return gradients
        if self._parallelism.joins():
            raise RuntimeError(MEAN_IN_JOIN)
        if not self._running:
            return gradients
        self._reductions += 1
        self._reach(-self._reductions)  # not the place of a backward that reduces
        self._reducing = True
        means = self._parallelism.average(gradients)
        self._reducing = False
        return means

    def end(self) -> None:
        """The last thing in a step that can be put back: it counts if every process has come here.

        Raises:
            RuntimeError: another process failed, or gradients are left that nothing reduces.
        """
        self._parallelism.check_reduced()
        if self._running:
            self._reach(END)
            self._over = self._done = True

    def _begin(self, trains: bool) -> None:
        parallelism = self._parallelism
        self._over = self._done = False
        self._reductions = 0
        reduces = parallelism.reduces_now() or (self.averages and parallelism.parallel is not None)
        speaks = self._owed == LOST or parallelism.talks or (trains and reduces)
        if parallelism.joins() or not speaks:
            return
        if self._ballot is None:
            self._ballot = Ballot(*parallelism.processes(), next(self._model.parameters()).device)
        self._steps += 1
        self._issued = self._ballot.issued()
        self._running = True

    def _own_up(self) -> None:
        """Before anything else is sent to others that still wait for what this process failed to send."""
        if self._owed == LOST and self._running:
            self._reach(END)

    def _align(self, stack: contextlib.ExitStack, trains: bool) -> None:
        try:
            stack.enter_context(self._parallelism.aligned(trains))
        except RuntimeError as error:
            self._refuse_absent(error)
            self._over = True
            raise RuntimeError(self._refusal) from error

    def _reach(self, place: int) -> None:
        """Wait for all others to come to this place of the step."""
        verdict = self._counted(self._cast(FINE, place))
        self._over = verdict is None or verdict.said == FAILED or not verdict.same
        if verdict is None:
            raise RuntimeError(self._refusal)
        if self._over:
            raise RuntimeError(VOID.format(rank=verdict.rank) if verdict.said == FAILED else APART)

    def _fail(self, trains: bool) -> None:
        """Say so, without waiting for the others: whoever raised wants to be heard now.

        A process waits for its votes when it exits, so nothing is said while the others wait for a gradient: they would
        wait on, where an exit tells them at once. (The same where they have left this step, and keep what it brought.)
        """
        if self._done or (self._reducing and not self._over):
            self._owed = LOST
        elif self._running and not self._over:
            self._posted = self._cast(FAILED, None)
        elif self._parallelism.joins():
            self._refuse(IN_JOIN)
        elif trains and not self._running:
            self._owed = min(self._owed, FAILED)

    def _settle(self) -> None:
        """Let the others come to the end of the step that failed here."""
        count, self._posted = self._posted, None
        if count is not None:
            self._counted(count)

    def _cast(self, said: int, place: int | None) -> Count | None:
        """Vote; None, and every further step refused, where the others are gone."""
        assert self._ballot is not None
        try:
            issued = self._ballot.issued() - self._issued
            count = self._ballot.cast(min(said, self._owed), self._steps, issued, place, haste=said == FAILED)
        except RuntimeError as error:
            self._refuse_absent(error)
            return None
        self._owed = FINE
        return count

    def _counted(self, count: Count | None) -> Verdict | None:
        """The verdict; None, and every further step refused, where there is no going on."""
        if count is None:
            return None
        try:
            verdict = count.wait()
        except RuntimeError as error:
            self._refuse_absent(error)
            return None
        if verdict.said == LOST:
            self._refuse(IN_REDUCTION.format(rank=verdict.rank))
        elif not verdict.aligned:
            self._refuse(UNEQUAL)
        return None if self._refusal else verdict

    def _refuse_absent(self, error: RuntimeError) -> None:
        self._refuse(f"{ABSENT} ({error})")

    def _refuse(self, why: str) -> None:
        self._refusal = LOST_STEP.format(why=why)
