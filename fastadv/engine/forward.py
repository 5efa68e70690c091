"""The forward pass that is running, as the hooks in the model see it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Size, Tensor

from fastadv.engine import at
from fastadv.engine.blocks import REENTRANT, Blocks, begin_again
from fastadv.engine.lookup import Lookup, is_same
from fastadv.engine.profile import span
from fastadv.engine.results import Closure, Reached

if TYPE_CHECKING:
    from fastadv.engine.model.placed import Placed
    from fastadv.engine.model.split import Crossing
    from fastadv.engine.perturb.ranks import Ranks
    from fastadv.engine.step import Step

Kind = Literal["full", "probe", "partial", "scout"]

NO_GRADIENT = (
    "the last pass left no gradient at the perturbed embedding's output: the loss does not depend on it, or the "
    "function given as backward= ran no backward"
)
NEVER_CALLED = (
    "the closure never ran the perturbed embedding ({names}). Does it run another model, or pass inputs_embeds? "
    "Was the model compiled and called before the method was made (make the method first)? Was the embedding replaced "
    "(make the method again)? Was the method closed?"
)
APPLIED = "a perturbation is applied to this model already: leave that `applied()` block first"
MOVED_ON = (
    "activation checkpointing recomputes the perturbed module after the perturbation has moved on, and this method "
    "goes back through the passes before that: keep it outside of checkpointed segments"
)
WHICH_PADDING = (
    "the embedding's output is sharded over the sequence, and padding_idx does not say what of this rank's part is "
    "padding: give mask=, [B, T] of this rank's positions"
)
WHICH_CALL = (
    "activation checkpointing recomputes an embedding, and which of its calls cannot be told ({alike} calls of shape "
    "{shape} were seen in the forward pass). Use checkpoint(..., use_reentrant=False), and keep the embedding outside "
    "of checkpointed segments."
)


def as_far_as_reached(closure: Closure) -> Closure:
    """The closure, which returns None where its forward is stopped by `Reached`."""

    def run() -> Any:
        with contextlib.suppress(Reached):
            return closure()

    return run


class Perturbing(Protocol):
    """A forward pass with a perturbation: one of a step's, or any while a found perturbation is applied."""

    fused: bool | None
    crossing: Crossing | None  # of the split, for YOPO
    cursor: int  # calls so far
    ended: bool  # a module that runs now is recomputed by a checkpoint

    def open(self, mask: Tensor) -> None:
        """An `at(mask)` block begins."""

    def close(self) -> None:
        """It ends."""

    def enter(self, like: Tensor, shape: Size, ids: Tensor | None, module: int, plain: bool = False) -> Lookup | None:
        """The lookup that is happening, or None where it is left alone.

        Its result has `shape`, and dtype and device of `like`; `plain`: it is W[ids] and nothing else.
        """

    def detaches(self, lookup: Lookup, table: Tensor) -> bool:
        """Whether autograd need not compute this lookup's gradient by `table`."""

    def place(self, placed: Placed) -> None:
        """The result of the next lookup lies on a mesh of ranks."""

    def divide(self, module: int, *, has_ids: bool) -> None:
        """The result of the next lookup is a part of each sample; `has_ids`: and its ids are those of that part."""


class Entrances:
    """Where hooks find an entrance by its name. What hangs in a module is constant in shape to a compiler."""


class Entrance:
    """Where the hooks in a model find the running pass. None, as between steps: the model is the plain one."""

    forward: Perturbing | None = None
    ranks: Ranks | None = None  # that each hold a part of what is perturbed
    _count = itertools.count()

    def __init__(self) -> None:
        self.name = f"at{next(self._count)}"
        setattr(Entrances, self.name, self)

    def remove(self) -> None:
        """When no hook is left that could ask for it."""
        if hasattr(Entrances, self.name):
            delattr(Entrances, self.name)


class Forward:
    """One pass of a step: "full" (trains), "probe" (the perturbation's gradient alone), "partial" (first layers).

    A "scout" comes before the first pass and ends at the first call: see `fastadv.engine.scout`.
    """

    def __init__(self, step: Step, kind: Kind, crossing: Crossing | None = None, last: bool = False) -> None:
        self.step = step
        self.lookups = step.lookups
        self.fused = step.lookups.places.fused
        self.kind = kind
        self.crossing = crossing
        self.last = last  # no other full pass follows
        self.cursor = 0
        self.ran_without_grad = False
        self.ended = False
        self.blocks = Blocks(step)

    def run(self, closure: Closure, read: Callable[[Any], Any], *, eager: bool = False) -> tuple[Any, Any]:
        """Run the closure with the perturbation in its model: its output, and the loss that `read` finds in it.

        `eager`: though the model is compiled.
        """
        step, engine = self.step, self.step.engine
        step.draws.next_pass()
        output = self._called(closure, eager)
        if engine.enters:
            self._check_calls()
        loss = read(output)
        self.ended = True
        engine.entrance.forward = None
        return output, loss

    def _called(self, closure: Closure, eager: bool) -> Any:
        """What the closure returns. A step's first pass begins again where the closure uses `at`, or does not, other
        than the last step's did: what ran before its first block was then perturbed, or was not.
        """
        step, engine, first = self.step, self.step.engine, not self.lookups.settled
        engine.entrance.forward = self if engine.enters else None
        with engine.parallelism.eagerly(eager), span("forward"):
            output = step.call(as_far_as_reached(closure) if first else closure)
        if not first or not engine.enters or self.lookups.under_at == self.blocks.opened:
            return output
        begin_again(step, under_at=self.blocks.opened)
        self.blocks, self.cursor, self.ran_without_grad = Blocks(step), 0, False
        return self._called(closure, eager or engine.traced)

    def open(self, mask: Tensor) -> None:
        """See `Perturbing`; a partial pass would end in the first forward of a block.

        Raises:
            RuntimeError, ValueError: as `Blocks.open` does, and where the method has a split.
        """
        if self.crossing is not None:
            raise RuntimeError(at.PARTIAL)
        self.blocks.open(mask)

    def close(self) -> None:
        """See `Perturbing`."""
        self.blocks.where = None

    @contextlib.contextmanager
    def backward(self) -> Iterator[None]:
        """Around this pass's backward: a perturbed module that runs inside is recomputed by a checkpoint."""
        engine = self.step.engine
        engine.entrance.forward = self if engine.enters else None
        with span("backward"):
            yield
        engine.entrance.forward = None
        if self.crossing is not None:
            self.crossing.check()
            self.step.crossing = self.crossing

    def enter(self, like: Tensor, shape: Size, ids: Tensor | None, module: int, plain: bool = False) -> Lookup | None:
        """The lookup of the next call in call order; see `Perturbing`."""
        if self.lookups.under_at:
            return self.blocks.enter(like, shape, ids, module, plain=plain, ended=self.ended)
        if self.ended:
            return self._again(shape, ids, module)
        if not torch.is_grad_enabled():
            self.ran_without_grad = True
            return None
        index, materialised = self.cursor, not (plain and self.lookups.places.by_row)
        self.cursor = index + 1
        items = self.lookups.items
        if index >= len(items) or not items[index].fits(shape, like.dtype, like.device, materialised):
            self.step.new_lookup(index, shape, like, ids, module, materialised)
        if self.kind == "scout":
            raise Reached
        lookup = items[index]
        lookup.ids, lookup.module = ids, module
        lookup.clean = like.detach() if self.lookups.places.clamps and not plain else None
        lookup.table = like if plain and ids is not None and lookup.looks_up(ids) else None
        return lookup

    def detaches(self, lookup: Lookup, table: Tensor) -> bool:
        """In a probe, always; in a full pass, where the step itself sees to the table's gradient."""
        if self.kind != "full":
            return True
        return lookup.table is table and self.step.tables.owns(lookup.module, table)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def place(self, placed: Placed) -> None:
        """See `Perturbing`; ranks that hold the same must draw the same."""
        seed = self.step.drawn_from()
        if seed is not None:
            self.step.engine.seed_check.on(placed, seed)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def divide(self, module: int, *, has_ids: bool) -> None:
        """See `Perturbing`; where no group says who has the other parts, what needs all of a sample is refused."""
        by_ids = self.lookups.given_mask(self.cursor) is None and self.lookups.places.padding[module] is not None
        if by_ids and not has_ids:
            raise ValueError(WHICH_PADDING)
        self.step.perturbation.divide(has_ids=has_ids)

    def _again(self, shape: Size, ids: Tensor | None, module: int) -> Lookup:
        """The call that a checkpoint recomputes: the same ids, or else the only one of that module and shape."""
        if self.step.waiting:
            raise RuntimeError(MOVED_ON)
        of_module = [lookup for lookup in self.lookups.items[: self.cursor] if lookup.module == module]
        alike = [lookup for lookup in of_module if lookup.delta.shape == shape]
        same = [one for one in alike if ids is not None and one.ids is not None and is_same(one.ids, ids)]
        if len(same or alike) != 1:
            raise RuntimeError(WHICH_CALL.format(alike=len(alike), shape=tuple(shape)))
        return (same or alike)[0]

    def _check_calls(self) -> None:
        """Raises RuntimeError if the closure did not run the perturbed modules."""
        if self.lookups.under_at:
            self.blocks.check()
            return
        if self.cursor == 0:
            if self.ran_without_grad:
                raise RuntimeError(f"the embedding ran under no_grad only. If {REENTRANT}")
            raise RuntimeError(NEVER_CALLED.format(names=", ".join(self.lookups.places.names)))
        self.lookups.settle(self.cursor)


def differentiate(
    ends: Sequence[Tensor], leaves: Sequence[Tensor], weights: Sequence[Tensor] | None = None
) -> Sequence[Tensor | None]:
    """The gradients of `leaves`, and of nothing else.

    Raises:
        RuntimeError: reentrant checkpointing, which gives gradients to parameters alone.
    """
    try:
        found: Sequence[Tensor | None] = torch.autograd.grad(ends, leaves, weights, allow_unused=True)
    except RuntimeError as error:
        if any(said in str(error) for said in ("Checkpointing is not compatible", "checkpoint is incompatible with")):
            raise RuntimeError(REENTRANT) from error
        raise
    return found
