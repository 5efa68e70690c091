"""Where a partial pass ends: at the output of a module, whose gradient from the last backward stands for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.forward import Entrance
from fastadv.engine.model.find import chosen, first_tensor, unwrap
from fastadv.engine.model.hook import NotCopied
from fastadv.engine.results import Reached

SplitChoice = str | nn.Module | None

NEVER_RAN = "the split ({name}) never ran: choose a module that the closure's forward calls, split=NAME or split=MODULE"
NO_TENSOR = (
    "the split ({name}) returned {kind}, and a partial pass ends at a tensor, or a tuple that begins with one: choose "
    "a module inside it, such as its first layer"
)
NO_GRADIENT = (
    "the loss does not depend on the output of the split ({name}): does it run after the loss, under no_grad (in "
    "checkpoint(..., use_reentrant=True) as well: use_reentrant=False), or beside what the loss is computed from? "
    "Choose a module between the embedding and the loss"
)
NOT_ON_THE_WAY = (
    "the output of the split ({name}) does not depend on the perturbed embedding: choose a module that runs after it"
)
TOO_EARLY = (
    "the split ({name}) runs before the embedding's call {call} (an encoder and a decoder share it?), and a partial "
    "pass would never reach that: perturb one embedding, embedding=NAME, or choose a split after its last call"
)


class Split(NotCopied):
    """A hook on the module at which partial passes end. It tells the running pass's `Crossing`."""

    def __init__(self, model: nn.Module, choice: SplitChoice, modules: list[nn.Module], entrance: Entrance) -> None:
        self.module = _default(model) if choice is None else chosen(model, choice, "split")
        self.name = next((name for name, part in unwrap(model).named_modules() if part is self.module), "split")
        if any(self.module is embedding for embedding in modules):
            raise ValueError(
                f"the split ({self.name}) is the perturbed embedding itself, so that there would be nothing to run: "
                "choose a later module, such as the model's first layer"
            )
        self.entrance = entrance
        self._handle = self.module.register_forward_hook(self)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        forward = self.entrance.forward
        if forward is not None and forward.crossing is not None and not forward.ended:
            forward.crossing.reach(first_tensor(output), forward.cursor)


class Crossing:
    """The split in one pass. Where its module is called several times (layers that share weights), the first counts.

    Args:
        name: of the split.
        ends: whether the forward ends there.
        partial: whether this is a partial pass; otherwise the backward's gradient at the split is kept.
    """

    def __init__(self, name: str, *, partial: bool = False, ends: bool = False) -> None:
        self.name = name
        self.partial = partial
        self.ends = ends
        self.hidden: Tensor | None = None  # the split's output, in a partial pass
        self.gradient: Tensor | None = None  # of the output, in any other
        self._seen = False
        self._calls = 0  # of the embedding, by then

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def reach(self, hidden: Any, calls: int) -> None:
        """The split has run, after so many calls of the embedding."""
        if self._seen:
            return
        if not isinstance(hidden, Tensor):
            raise TypeError(NO_TENSOR.format(name=self.name, kind=type(hidden).__name__))
        self._seen, self._calls = True, calls
        if self.partial:
            self.hidden = hidden
            if self.ends:
                raise Reached
        elif hidden.requires_grad:
            hidden.register_hook(self._keep)  # type: ignore[no-untyped-call]

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient

    def output(self, calls: int) -> Tensor:
        """After a partial pass's forward: the split's output, in a model that calls its embedding so often.

        Raises:
            RuntimeError: the split did not run, or the embedding is called again behind it.
        """
        if self.hidden is None:
            raise RuntimeError(NEVER_RAN.format(name=self.name))
        if self._calls < calls:
            raise RuntimeError(TOO_EARLY.format(name=self.name, call=self._calls + 1))
        return self.hidden

    def check(self) -> None:
        """After a full pass's backward or a probe's.

        Raises:
            RuntimeError: there is no gradient that partial passes could follow.
        """
        if not self._seen:
            raise RuntimeError(NEVER_RAN.format(name=self.name))
        if self.gradient is None:
            raise RuntimeError(NO_GRADIENT.format(name=self.name))


def _default(model: nn.Module) -> nn.Module:
    """The first block of the longest stack of layers. Stacks inside of blocks (a block's parts, experts) are none."""
    stacks = list(_stacks(unwrap(model)))
    if not stacks:
        raise ValueError(
            f"{type(unwrap(model)).__name__} has no stack of layers (nn.ModuleList) whose first block could be the "
            "split: say where partial passes end, split=NAME or split=MODULE"
        )
    return max(stacks, key=len)[0]  # the first of those


def _stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    for part in module.children():
        if isinstance(part, nn.ModuleList) and len(part) > 0:
            yield part
        else:
            yield from _stacks(part)
