"""Outputs that tensor parallelism has placed on a mesh of ranks, and what a perturbation of them is.

The hooks of a plan (`parallelize_module`) come after a module's own output, and the perturbation before them, so that
it is added to what the module means: the whole of it on every rank, wherever the plan then sends it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from fastadv.engine.perturb.ranks import Ranks

PLANS = "torch.distributed.tensor"
SAME = (
    "the embedding's output is the same on all ranks of process_group=, so that its norm is whole on each: leave "
    "process_group out. (Where the plan shards it over the sequence, make the method after parallelize_module.)"
)
SEEDS = (
    "the ranks of a tensor-parallel mesh hold the same embedding, and draw its random start from different seeds: "
    "torch.manual_seed(...) with the same number on all of them, as their dropout needs too"
)


class Placed:
    """A DTensor that is perturbed. Sums that are due are made, and vectors that are cut in pieces put together.

    Attributes:
        output: the same on every rank of a dimension of its mesh, or sharded over the batch or the sequence.
        local: what of it lies on this rank.
        over_sequence: whether a rank has a part of each sample.

    Raises:
        ValueError: it is the same on all ranks of `ranks`, whose parts are to be put together.
    """

    def __init__(self, output: Any, ranks: Ranks | None) -> None:
        from torch.distributed.tensor import Replicate

        axes = [_axis(place, output.ndim) for place in output.placements]
        cut = [axis == output.ndim - 1 for axis in axes]
        whole = [
            Replicate() if place.is_partial() or in_pieces else place
            for place, in_pieces in zip(output.placements, cut, strict=True)
        ]
        self._placements = output.placements if any(cut) else whole  # as the next module expects it
        self.output: DTensor = output if whole == list(output.placements) else output.redistribute(placements=whole)
        self.local = self.output.to_local()
        self.over_sequence = any(0 < axis < output.ndim - 1 for axis in axes)
        if ranks is not None:
            mesh = output.device_mesh
            if any(place.is_replicate() and ranks.spread_over(mesh, index) for index, place in enumerate(whole)):
                raise ValueError(SAME)

    def plus(self, delta: Tensor) -> Tensor:
        """The output, moved by what lies on this rank of the perturbation; placed as the output was."""
        from torch.distributed.tensor import DTensor

        output = self.output
        delta = delta.view_as(delta)
        if delta.requires_grad:
            delta.register_hook(_waited)  # type: ignore[no-untyped-call]
        added = DTensor.from_local(
            delta, output.device_mesh, output.placements, shape=output.shape, stride=output.stride(), run_check=False
        )
        moved: Any = (output.to(delta.dtype) + added).to(output.dtype)
        in_place = list(moved.placements) == list(self._placements)
        return moved if in_place else moved.redistribute(placements=self._placements)  # type: ignore[no-any-return]


class SeedCheck:
    """The check of one method's draws: in its first step, since reading waits for a GPU."""

    def __init__(self) -> None:
        self._trusted: set[Any] = set()

    def on(self, placed: Placed, seed: int) -> None:
        """Look whether the ranks that hold the same draw from the same seed.

        Raises:
            ValueError: they do not.
        """
        mesh = placed.output.device_mesh
        for dimension, place in enumerate(placed.output.placements):
            if not place.is_replicate() or (mesh, dimension) in self._trusted:
                continue
            ends = torch.tensor([seed, -seed], device=mesh.device_type)
            dist.all_reduce(ends, dist.ReduceOp.MIN, mesh.get_group(dimension))
            least, most = ends.tolist()
            if least != -most:
                raise ValueError(SEEDS)
            self._trusted.add((mesh, dimension))


def _waited(gradient: Tensor) -> Tensor:
    """A gradient that another rank is still sending, when it is there."""
    wait = getattr(gradient, "wait", None)
    return gradient if wait is None else wait()


def is_placed(tensor: object) -> bool:
    """Whether it is a DTensor."""
    if type(tensor) is Tensor or PLANS not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def here(ids: Tensor | None) -> Tensor | None:
    """Ids as a plain tensor: those on this rank."""
    if ids is None or not is_placed(ids):
        return ids
    local: Tensor = ids.to_local()  # type: ignore[attr-defined]
    return local


def is_planned(module: nn.Module) -> bool:
    """Whether a plan has hooked the output of `module`: it returns a DTensor, which the hook may turn into another."""
    return any(getattr(hook, "__module__", "") == f"{PLANS}._api" for hook in module._forward_hooks.values())


def planned_over_sequence(module: nn.Module, *, before: bool) -> bool:
    """Whether PrepareModuleOutput says that plain outputs of `module` are sharded over the sequence.

    Args:
        module: a perturbed one.
        before: whether it is perturbed before that hook.
    """
    if f"{PLANS}.parallel" not in sys.modules:
        return False
    from torch.distributed.tensor.parallel import PrepareModuleOutput

    cells = [cell.cell_contents for hook in module._forward_hooks.values() for cell in _closure(hook)]
    plans = [one for one in cells if isinstance(one, PrepareModuleOutput)]
    layouts = [(one.output_layouts if before else one.desired_output_layouts)[0] for one in plans]
    return any(place is not None and _axis(place, 3) == 1 for place in layouts)


def _axis(place: Any, dimensions: int) -> int:
    """Which of a tensor's dimensions is sharded; -1: none."""
    return place.dim % dimensions if place.is_shard() else -1


def _closure(hook: object) -> tuple[Any, ...]:
    return getattr(hook, "__closure__", None) or ()
