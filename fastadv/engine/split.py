"""Where a partial pass ends: at the output of a module, whose gradient from the last backward stands for the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.engine.embedding import chosen, first_tensor, unwrap
from fastadv.engine.interception import NotCopied
from fastadv.engine.loss import loss_of
from fastadv.engine.site import Site

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


class Reached(BaseException):
    """The forward has come to the split. Not an Exception: nothing on the way is to take it for an error."""


class Split(NotCopied):
    """A hook on one module: in a full pass it watches for the output's gradient, in a partial pass it ends the forward.

    Where a module is called several times in a forward (layers that share weights), the first call counts.
    """

    def __init__(self, model: nn.Module, choice: SplitChoice, site: Site) -> None:
        self.module = _default(model) if choice is None else chosen(model, choice, "split")
        self.name = next((name for name, part in unwrap(model).named_modules() if part is self.module), "split")
        if any(self.module is embedding for embedding in site.modules):
            raise ValueError(
                f"the split ({self.name}) is the perturbed embedding itself, so that there would be nothing to run: "
                "choose a later module, such as the model's first layer"
            )
        self.site = site
        self.gradient: Tensor | None = None  # of the output, in the last backward
        self._hidden: Tensor | None = None  # the output, in a partial pass
        self._lookups = 0  # how often the embedding had been called by then
        self._seen = self._partial = self._ends = False
        self._handle = self.module.register_forward_hook(self)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def begin_pass(self) -> None:
        """A full pass begins; the module's first call in it counts."""
        self._seen, self._partial, self._hidden, self.gradient = False, False, None, None

    def run(self, closure: Callable[[], Any], *, whole: bool) -> tuple[list[Tensor], list[Tensor]]:
        """A partial pass: where its backward begins, and with which gradients: at the split's output, with p.

        `whole` is for FSDP2: the forward runs to its end, since its modules must see the end of what they began; and
        the loss takes part with a zero, since a module's weights are gathered when the gradient of its output comes.

        Raises:
            RuntimeError: the split did not run, or the embedding will be called again behind it.
        """
        assert self.gradient is not None
        self._seen, self._partial, self._ends = False, True, not whole
        ends, weights = [], []
        with contextlib.suppress(Reached):
            loss = loss_of(closure())
            ends, weights = [loss], [torch.zeros_like(loss)]
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError(NEVER_RAN.format(name=self.name))
        if self.site.live and self._lookups < len(self.site.calls):
            raise RuntimeError(TOO_EARLY.format(name=self.name, call=self._lookups + 1))
        return [*ends, hidden], [*weights, self.gradient]

    def check(self) -> None:
        """After a full pass and its backward.

        Raises:
            RuntimeError: there is no gradient to hold.
        """
        if not self._seen:
            raise RuntimeError(NEVER_RAN.format(name=self.name))
        if self.gradient is None:
            raise RuntimeError(NO_GRADIENT.format(name=self.name))

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        if self.site.live and self.site.searching and not self.site.recomputing:
            self._reached(first_tensor(output))

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _reached(self, hidden: Any) -> None:
        if self._seen:
            return
        if not isinstance(hidden, Tensor):
            raise TypeError(NO_TENSOR.format(name=self.name, kind=type(hidden).__name__))
        self._seen = True
        if self._partial:
            self._hidden, self._lookups = hidden, self.site.cursor
            if self._ends:
                raise Reached
        elif hidden.requires_grad:
            hidden.register_hook(self._keep)  # type: ignore[no-untyped-call]

    def _keep(self, gradient: Tensor) -> None:
        self.gradient = gradient


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
