"""Whether a graph can be differentiated twice where somebody else than torch wrote its backward.

torch's own functions have a second derivative or raise. A function of a user's may have a backward that works on saved
numbers, as fused losses and custom kernels do: autograd then takes its gradient for a constant, and says nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

CONSTANT = (
    "LLR differentiates the model twice, and {name} has no second derivative: its gradient changes with its input, and "
    "autograd cannot see how (a fused loss or a custom kernel whose backward works on saved numbers?). Put the plain "
    "operation in its place, or write its backward with differentiable operations on saved inputs"
)
JUMP = 0.5  # of an element's size: a change that a mask makes, and no small step
MANY = 0.25  # of all elements: more than a mask's boundary has


class CustomFunctions:
    """Those in the graph of one pass, and what came back to them.

    Args:
        loss: of the pass, before anything went back through it.
    """

    def __init__(self, loss: Tensor) -> None:
        self._nodes = list(_custom(loss.grad_fn))
        self._incoming: list[Sequence[Tensor | None]] = [()] * len(self._nodes)
        keepers = (_keeper(self._incoming, index) for index in range(len(self._nodes)))
        self._handles = [node.register_prehook(keeper) for node, keeper in zip(self._nodes, keepers, strict=True)]

    def check(self, moved: Tensor) -> None:
        """Compare with the graph of a pass whose inputs were others: the same must come out for the same that comes in.

        A gradient that changes with the input, and that autograd takes for a constant, is a derivative that is missing.
        A mask (of a rectifier) changes too, at few elements and by all of their size: its derivative is zero.

        Args:
            moved: the loss of that pass.

        Raises:
            RuntimeError: a function has no second derivative.
        """
        for handle in self._handles:
            handle.remove()
        for node, incoming, other in zip(self._nodes, self._incoming, _custom(moved.grad_fn), strict=False):
            if type(node).__name__ != type(other).__name__ or all(one is None for one in incoming):
                continue
            here, again, there = (_outgoing(one, incoming) for one in (node, node, other))
            for gradients in zip(here, again, there, strict=True):
                if _departs(*gradients):
                    raise RuntimeError(CONSTANT.format(name=type(node).__name__.removesuffix("Backward")))


def _keeper(incoming: list[Sequence[Tensor | None]], index: int) -> Callable[[Sequence[Tensor | None]], None]:
    """A hook that keeps what comes in, and no node alive."""

    def keep(gradients: Sequence[Tensor | None]) -> None:
        incoming[index] = [None if one is None else one.detach() for one in gradients]

    return keep


def _custom(node: Any) -> Iterator[Any]:
    """The functions below `node` that are not torch's own, in an order that depends on the graph alone."""
    seen = set()
    waiting = [node]
    while waiting:
        one = waiting.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        waiting += [below for below, _ in one.next_functions]
        if isinstance(one, BackwardCFunction) or type(one).__name__ == "CppFunction":
            yield one


def _outgoing(node: Any, incoming: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The gradients that leave `node` where these come in, with a graph if they have one."""
    given = [(GradientEdge(node, index), one) for index, one in enumerate(incoming) if one is not None]
    leaving = [GradientEdge(below, index) for below, index in node.next_functions if below is not None]
    found: Sequence[Tensor | None] = torch.autograd.grad(
        [edge for edge, _ in given], leaving, [one for _, one in given], create_graph=True, allow_unused=True
    )
    return found


@torch.no_grad()
def _departs(here: Tensor | None, again: Tensor | None, there: Tensor | None) -> bool:
    """Whether a gradient without a graph is another elsewhere, by more than between two calls, and not as a mask is."""
    if here is None or again is None or there is None or here.requires_grad or here.shape != there.shape:
        return False
    noise = (again - here).abs().amax() if here.numel() else 0
    change = (there - here).abs()
    changed = change > 8 * noise
    count = int(changed.sum())
    if count == 0:
        return False
    jumps = int((changed & (change > JUMP * torch.maximum(here.abs(), there.abs()))).sum())
    there_at_all = int(((here != 0) | (there != 0)).sum())
    return count > MANY * there_at_all or 2 * jumps < count
