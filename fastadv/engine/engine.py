"""What lives with the model: its hooks, its buffers, and the frame in which each step runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastadv.engine.buffers import Buffers
from fastadv.engine.forward import APPLIED, Entrance
from fastadv.engine.frame import Frame, Undo
from fastadv.engine.lookups import Lookups, Masks, Places
from fastadv.engine.model import find
from fastadv.engine.model.hook import Hook, install
from fastadv.engine.model.parallelism import Parallelism
from fastadv.engine.model.placed import SeedCheck
from fastadv.engine.model.split import Split, SplitChoice
from fastadv.engine.owner import Owner
from fastadv.engine.perturb.masks import MaskCheck
from fastadv.engine.perturb.perturbation import Perturbation
from fastadv.engine.perturb.positions import PositionPerturbation
from fastadv.engine.perturb.ranks import Ranks
from fastadv.engine.perturb.rows import RowPerturbation
from fastadv.engine.perturb.start import Draw
from fastadv.engine.perturb.tied_tables import TiedTables, tied_weights
from fastadv.engine.profile import span
from fastadv.engine.results import Closure, Term, check_closure
from fastadv.engine.safety.agreement import Agreement
from fastadv.engine.safety.guard import Guard
from fastadv.engine.safety.inventory import Inventory
from fastadv.engine.safety.probe_autocast import ProbeAutocast
from fastadv.engine.step import Step

T = TypeVar("T")

SCOPES = ("table", "row", "batch", "sample", "token")
TABLE_SCOPES = ("table", "row")

BUSY = "a step is already running: the closure must not call the method that calls it"


def _remove(hooks: list[Hook | Split]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


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
        ranks: Ranks | None = None,
        refusal: str = "",
    ) -> None:
        self.model = model
        self.refusal = refusal
        self.modules = find.find(model, embedding) if perturbs else []
        self.parallelism = Parallelism(model)
        self.agreement = Agreement(self.parallelism, model)
        padding = [None if ignore_padding else getattr(module, "padding_idx", None) for module in self.modules]
        by_row = scope in TABLE_SCOPES and not self.parallelism.compiled
        self.places = Places(self.modules, padding, by_row, fused, MaskCheck(parts=ranks is not None))
        self.seed_check = SeedCheck()
        self.buffers = Buffers()
        self.ranks = ranks
        self.new_perturbation = self._scoped(scope, tied)
        self.enters = bool(self.modules) and tied != "both"  # whether hooks add a perturbation
        self.last: Perturbation | None = None  # of the last step, for its norm
        self.inventory = Inventory(model)
        self.guard = Guard(self.inventory, atomic, fused)
        self.dropout = dropout
        self.owner = owner
        self.probe_autocast = ProbeAutocast(model, probe_dtype)
        self.new_term: Callable[[Step], Term] | None = None
        self.split: Split | None = None
        self.share = 1.0  # of an optimizer step that one batch is; terms that methods add are multiplied with it
        self.entrance = Entrance()
        self.entrance.ranks = ranks
        self.closed = False
        self.busy = False
        self._hooks: list[Hook | Split] = []
        weakref.finalize(self, _remove, self._hooks)  # where nobody calls close()
        if self.enters:
            self._hooks += [install(module, index, self.entrance) for index, module in enumerate(self.modules)]

    def _scoped(self, scope: str, tied: str) -> Callable[[Lookups], Perturbation]:
        kind: type[Perturbation] = RowPerturbation if scope in TABLE_SCOPES else PositionPerturbation
        if scope in TABLE_SCOPES and any(find.vocabulary(module) is None for module in self.modules):
            raise ValueError(f"scope={scope!r} needs an nn.Embedding; for another module's output use scope='sample'")
        if scope in TABLE_SCOPES and tied == "both":
            tied_weights(self.modules)  # refuses tables that cannot move
            kind = TiedTables
        # And not the engine, which would then wait for the garbage collector.
        buffers, ranks, agree = self.buffers, self.ranks, self.agreement.meet

        def made(lookups: Lookups) -> Perturbation:
            perturbation = kind(lookups, scope, buffers)
            perturbation.meeting = None if ranks is None else ranks.meet(agree)
            return perturbation

        return made

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
        _remove(self._hooks)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        self.inventory.look()
        return self.inventory.device

    @property
    def watched(self) -> bool:
        """Whether somebody outside waits for autograd to bring every parameter's gradient."""
        return self.owner.reads_gradients or self.parallelism.reduces()

    def names(self) -> str:
        """The perturbed modules, as the model calls them."""
        names = [name for name, part in self.model.named_modules() if any(part is module for module in self.modules)]
        return ", ".join(names) or type(self.modules[0]).__name__

    # A step

    def run(
        self,
        schedule: Callable[[Step], T],
        closure: Closure,
        masks: Masks = None,
        *,
        attack: Closure | None = None,
        start: Callable[[], Draw | None] | None = None,
        trains: bool = False,
    ) -> T:
        """Run a schedule as one step: it begins with no perturbation and, if it fails, leaves no trace.

        The seed of `start` is drawn first, before the state that dropout="same" replays, so that every step starts
        elsewhere.
        """
        self._check(closure, attack)

        def new_step(frame: Frame) -> Step:
            return Step(self, frame, closure, masks, attack, None if start is None else start())

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
