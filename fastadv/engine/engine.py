"""What lives with the model: its hooks, its buffers, and the frame in which each step runs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastadv.engine.buffers import Buffers
from fastadv.engine.forward import APPLIED, Entrance
from fastadv.engine.frame import Frame, Undo
from fastadv.engine.lookups import Masks, Places
from fastadv.engine.model import find
from fastadv.engine.model.hook import Hook, InputHook, OutputHook, install
from fastadv.engine.model.parallelism import Parallelism
from fastadv.engine.model.placed import SeedCheck
from fastadv.engine.model.post_norms import warn_of_norms
from fastadv.engine.model.split import Split, SplitChoice
from fastadv.engine.owner import Owner
from fastadv.engine.perturb.documents import Groups
from fastadv.engine.perturb.masks import MaskCheck
from fastadv.engine.perturb.perturbation import Perturbation
from fastadv.engine.perturb.ranks import Ranks
from fastadv.engine.perturb.scopes import TABLE_SCOPES, kind_of, maker
from fastadv.engine.perturb.start import Draw
from fastadv.engine.profile import span
from fastadv.engine.results import Closure, Term, check_closure
from fastadv.engine.safety.agreement import Agreement
from fastadv.engine.safety.dropout import Evaluated
from fastadv.engine.safety.guard import Guard
from fastadv.engine.safety.inventory import Inventory
from fastadv.engine.safety.probe_autocast import ProbeAutocast
from fastadv.engine.step import Step

T = TypeVar("T")

BUSY = "a step is already running: the closure must not call the method that calls it"

DIVIDED_DOCUMENTS = (
    "groups= tells documents apart that lie whole in a row, and with process_group= a rank has a part of each row: "
    "give one of the two"
)


def _remove(hooks: list[Hook | Split], entrance: Entrance) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()
    entrance.remove()


class Engine:
    """One model, and the modules at which it is perturbed: none, where weights are.

    Args:
        model: the user's, wrapped or not.
        dropout: "fresh", "same" or "off".
        fused: which backend runs the ops.
        owner: of the backward of full passes.
        atomic: whether gradients that are there already are copied, to be put back on a fault.
        probe_dtype: autocast for probes; None: none.
        embedding: the perturbed modules; None: the model's input embedding.
        scope: over what norms are taken.
        tied: "both" moves the tables themselves.
        perturbs: False: nothing at any module.
        ignore_padding: no mask follows from an embedding's `padding_idx`.
        communication: what FSDP2 sends between the passes of a step.
        attack_mode: "eval": probes run as after `model.eval()`, and ascents follow no other pass.
        ranks: that each hold a part of what a norm is over; None: this one holds all of it.
        refusal: why no step can be run, where that is known already.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dropout: str,
        fused: bool | None,
        owner: Owner,
        atomic: bool,
        probe_dtype: torch.dtype | None,
        embedding: find.EmbeddingChoice = None,
        scope: str = "sample",
        tied: str = "lookup",
        perturbs: bool = True,
        ignore_padding: bool = False,
        communication: str = "each",
        attack_mode: str | None = None,
        ranks: Ranks | None = None,
        refusal: str = "",
    ) -> None:
        self.model = model
        self.refusal = refusal
        self.sites = find.sites(model, embedding) if perturbs else []
        self.modules, self.names = [site.module for site in self.sites], find.names(model, self.sites)
        warn_of_norms(model, self.sites, self.names)
        self._refusals: dict[str, str] = {}
        self.inventory = Inventory(model)
        self.parallelism = Parallelism(self.inventory, communication, atomic)
        self.agreement = Agreement(self.parallelism, model)
        padding = [None if ignore_padding else getattr(module, "padding_idx", None) for module in self.modules]
        self.of_tables = scope in TABLE_SCOPES
        self.places = Places(
            self.modules, self.names, padding, self._by_row(), fused, MaskCheck(parts=ranks is not None)
        )
        self.seed_check = SeedCheck()
        self.buffers = Buffers()
        self.ranks = ranks
        kind = kind_of(scope, tied, self.modules)
        self.new_perturbation = maker(kind, scope, self.buffers, ranks, self.agreement.meet)
        self.enters = bool(self.modules) and tied != "both"  # whether hooks add a perturbation
        self.traced = self.enters and find.is_traced(model, self.modules)  # whether a compiler sees them do so
        self.last: Perturbation | None = None  # of the last step, for its norm
        self.guard = Guard(self.inventory, atomic, fused)
        self.dropout, self.attack_mode = dropout, attack_mode
        self.owner = owner
        self.probe_autocast = ProbeAutocast(model, probe_dtype)
        self.new_term: Callable[[Step], Term] | None = None
        self.split: Split | None = None
        self.share: float | Tensor | None = None  # of the optimizer step that the batch is; None: as its loss counts
        self.entrance = Entrance()
        self.entrance.ranks = ranks
        self.closed = False
        self.busy = False
        self.new_step: Callable[..., Step] = Step  # of another kind where a pipeline runs the passes
        self._hooks: list[Hook | Split] = []
        weakref.finalize(self, _remove, self._hooks, self.entrance)  # where nobody calls close()
        self._install()

    def _install(self) -> None:
        """Hook the perturbed modules. What FSDP2 has gathered looks like any table, and is gone after the forward."""
        kind = OutputHook if self.parallelism.sharded else install
        for index, (module, side) in enumerate(self.sites if self.enters else ()):
            self._hooks.append((InputHook if side == "input" else kind)(module, index, self.entrance))

    def _by_row(self) -> bool:
        return self.of_tables and not self.parallelism.compiled

    def look(self) -> None:
        """Read what the model is wrapped in, where that has changed.

        Raises:
            ValueError: a wrapper under which no step can be run.
        """
        sharded = self.parallelism.sharded
        if self.parallelism.look():
            self.places = self.places._replace(by_row=self._by_row())
        if self.parallelism.sharded != sharded and self._hooks:
            self._replace_hooks()
        for kind, why in self._refusals.items():
            if getattr(self.parallelism, kind):
                raise ValueError(why)

    def _replace_hooks(self) -> None:
        """By those that a model needs which is sharded now, or no longer."""
        for hook in self._hooks:
            if not isinstance(hook, Split):
                hook.remove()
        self._hooks[:] = [hook for hook in self._hooks if isinstance(hook, Split)]  # the list that a finalizer has
        self._install()

    def refuse(self, **kinds: str) -> None:
        """From now on a model that is one of these kinds (see `Parallelism`) is an error that says why."""
        self._refusals = kinds
        try:
            self.look()
        except BaseException:
            self.close()
            raise

    def split_at(self, choice: SplitChoice) -> None:
        """From now on partial passes can be run, which end at the output of that module."""
        try:
            if not self.enters:
                raise ValueError("tied='both' moves the output layer too, which a partial pass never reaches")
            self.split = Split(self.model, choice, self.modules, self.entrance)
            self._hooks.append(self.split)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the hooks out of the model."""
        self.closed = True
        _remove(self._hooks, self.entrance)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        self.inventory.look()
        return self.inventory.device

    @property
    def watched(self) -> bool:
        """Whether somebody outside waits for autograd to bring every parameter's gradient."""
        return self.owner.reads_gradients or self.parallelism.reduces()

    def term_factor(self) -> float | Tensor:
        """What a term is multiplied with so that, after the owner's backward, it counts the batch's share."""
        return 1.0 if self.share is None else self.share * self.owner.divisor

    # A step

    def run(
        self,
        schedule: Callable[[Step], T],
        closure: Closure,
        masks: Masks = None,
        *,
        groups: Groups = None,
        attack: Closure | None = None,
        start: Callable[[], Draw | None] | None = None,
        trains: bool = False,
    ) -> T:
        """Run a schedule as one step: it begins with no perturbation and, if it fails, leaves no trace.

        The seed of `start` is drawn first, before the state that dropout="same" replays, so that every step starts
        elsewhere.
        """
        self._check(closure, attack)
        if groups is not None and self.ranks is not None:
            raise ValueError(DIVIDED_DOCUMENTS)

        def new_step(frame: Frame) -> Step:
            return self.new_step(self, frame, closure, masks, groups, attack, None if start is None else start())

        if not self.parallelism.among_others():
            return self._framed(schedule, new_step)
        with self.agreement.step(trains):  # outside: it tells the others when this process has put everything back
            return self._framed(schedule, new_step)

    def _framed(self, schedule: Callable[[Step], T], new_step: Callable[[Frame], Step]) -> T:
        frame = Frame(self)
        try:
            with span("step"):
                step = new_step(frame)
                frame.undo.append(step.perturbation.put_back)
                self.last, self.buffers.lookups = step.perturbation, step.lookups.items
                result = schedule(step)
                step.settle()
                frame.hear()
                self.agreement.end()
                frame.end()
                return result
        except BaseException:
            try:
                frame.roll_back()
            except BaseException:  # another interrupt, perhaps before it had begun
                frame.roll_back()
                raise
            raise

    def _check(self, closure: Closure, attack: Closure | None) -> None:
        """Raises the error that says why no step can run now."""
        if self.refusal:
            raise ValueError(self.refusal)
        for function in (closure, *([] if attack is None else [attack])):
            check_closure(function)
        if self.busy:
            raise RuntimeError(BUSY)
        if self.entrance.forward is not None:
            raise RuntimeError(APPLIED)
        self.look()

    def remember(self) -> Undo:
        """Return what forgets a step that failed."""
        last = self.last

        def put_back() -> None:
            self.last = last

        return put_back

    def memory(self) -> list[Tensor]:
        """The buffers that serve from step to step."""
        return self.buffers.memory()

    def norm(self, kind: str) -> Tensor:
        """The mean norm of the last perturbation's groups."""
        return torch.zeros((), device="cpu") if self.last is None else self.last.norm(kind)

    def probing(self) -> contextlib.AbstractContextManager[None]:
        """Around a probe: the owner of the backward knows of it, and modules are as `attack_mode` says."""
        inside = self.owner.probing()
        return Evaluated(inside, self.inventory.modules) if self.attack_mode == "eval" else inside

    def norms(self, kind: str) -> dict[str, Tensor]:
        """The same of each site by itself."""
        last = self.last
        each = [self.norm(kind) if last is None else last.norm(kind, site) for site in range(len(self.names))]
        return dict(zip(self.names, each, strict=True))
