"""Ranks that each hold a part of what a norm is over, and how they tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastadv.engine.safety.ballot import meet

Group = Any  # a ProcessGroup, or one dimension of a DeviceMesh; a torch built without distributed has neither

NO_GROUP = (
    "process_group= takes a torch.distributed ProcessGroup or one dimension of a DeviceMesh (mesh['cp']), not {got!r}"
)
OUTSIDE = "this rank is not in process_group=: give every rank the group that it is in"
APART = (
    "the ranks of process_group= are in different steps ({steps}): one has failed, or left a batch out. Their norms "
    "would be of different batches, so that no step is made. Start all ranks anew, from a checkpoint"
)
UNEVEN = (
    "the ranks of process_group= have different numbers of norms to put together ({sizes}). For scope='sample', and "
    "for steps and starts by sample, row i is a part of the same sample on every rank: as many rows everywhere, and as "
    "many calls of the embedding. Data-parallel ranks take scope='batch', 'table' or 'row'"
)


class Ranks:
    """The ranks of one group. Lives with the model.

    Attributes:
        size: how many they are.
        rank: which of them this one is.
        meeting: of the step that runs.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.meeting = Meeting(self, 0, lambda: None)
        self._steps = 0

    @staticmethod
    def of(choice: Group) -> Ranks | None:
        """The ranks of what a user gave as `process_group=`; None where there is but one.

        Raises:
            TypeError: it is neither a group nor one dimension of a mesh.
            ValueError: this rank is not in it.
        """
        if choice is None:
            return None
        group = choice.get_group() if getattr(choice, "ndim", 0) == 1 else choice
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError(OUTSIDE)
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(NO_GROUP.format(got=choice))
        if dist.get_rank(group) < 0:
            raise ValueError(OUTSIDE)
        return Ranks(group) if dist.get_world_size(group) > 1 else None

    def meet(self, agree: Callable[[], None] = lambda: None) -> Meeting:
        """A step begins, on all of them. `agree` raises where one that trains the same model has failed."""
        self._steps += 1
        self.meeting = Meeting(self, self._steps, agree)
        return self.meeting

    def total(self, part: Tensor) -> Tensor:
        """The sum over the ranks: of lengths, or of squares."""
        return self.meeting.gather(part).sum(0)

    def spread_over(self, mesh: Any, dimension: int) -> bool:
        """Whether these are the ranks of that dimension of a mesh."""
        return dist.get_process_group_ranks(mesh.get_group(dimension)) == dist.get_process_group_ranks(self.group)

    @property
    def talk(self) -> Any:
        """A group for what lies on the CPU, so that no device is waited for."""
        if "gloo" in str(dist.get_backend_config(self.group)):
            return self.group
        return meet("norms", tuple(dist.get_process_group_ranks(self.group)))


class Meeting:
    """One step of all ranks: what one of them sends, all of them do, and in the same order."""

    def __init__(self, ranks: Ranks, step: int, agree: Callable[[], None]) -> None:
        self.ranks = ranks
        self._step, self._agree = step, agree
        self._agreed: set[int] = set()  # sizes that are known to be the same everywhere

    def tell(self, *numbers: int) -> list[list[int]]:
        """What each rank says, by rank.

        Raises:
            RuntimeError: the ranks are in different steps.
        """
        self._agree()
        mine = torch.tensor([self._step, *numbers], device="cpu")
        every = [torch.empty_like(mine) for _ in range(self.ranks.size)]
        dist.all_gather(every, mine, self.ranks.talk)
        steps, *columns = torch.stack(every).t().tolist()
        if len(set(steps)) > 1:
            raise RuntimeError(APART.format(steps=", ".join(map(str, steps))))
        return [list(row) for row in zip(*columns, strict=True)]

    def gather(self, part: Tensor) -> Tensor:
        """[ranks, *part.shape]: everybody's part, the same to the bit on every rank.

        Raises:
            ValueError: the parts have different sizes.
            RuntimeError: the ranks are in different steps.
        """
        if part.numel() not in self._agreed:
            sizes = [size for (size,) in self.tell(part.numel())]
            if len(set(sizes)) > 1:
                raise ValueError(UNEVEN.format(sizes=", ".join(map(str, sizes))))
            self._agreed.add(part.numel())
        self._agree()
        every = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.ranks.size)]
        dist.all_gather(every, part.detach().contiguous(), self.ranks.group)
        return torch.stack(every)
