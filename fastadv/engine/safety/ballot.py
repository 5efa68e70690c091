"""One small all-reduce, over processes that train one model, on a gloo group of its own.

The model's own group would do no good: where one process waits there for a gradient and another one asks whether all
is well, the two would be taken for each other's. On the CPU, because what is asked must not wait for a GPU.
"""

from __future__ import annotations

import atexit
import datetime as dt
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

FINE, FAILED, LOST = 2, 1, 0  # what a process says; the least that any of them says is what holds
SHIFT = 32  # a vote is what a process says, and below it who says so
NEUTRAL = 2**62
HASTE = dt.timedelta(seconds=60)

# By purpose and ranks; made once, and never given up: every process must do the same.
_groups: dict[tuple[str, tuple[int, ...]], Any] = {}
atexit.register(_groups.clear)  # gloo's threads must not outlive the interpreter


class Verdict(NamedTuple):
    """What all processes said together."""

    said: int  # FINE, FAILED or LOST: the worst
    rank: int  # who said so
    aligned: bool  # all are in the same step, with as many collectives behind them
    same: bool  # all are at the same place of it


class Count(NamedTuple):
    """One round of votes, which another process may not have come to yet."""

    work: Any
    votes: Tensor

    def wait(self) -> Verdict:
        """Raises RuntimeError if a process did not come within the group's time, or is gone."""
        self.work.wait()
        vote, *pairs = self.votes.tolist()
        steps, issued, place = (low == -high for low, high in zip(pairs[::2], pairs[1::2], strict=True))
        return Verdict(vote >> SHIFT, vote & (2**SHIFT - 1), steps and issued, place)


class Ballot:
    """The processes of some groups.

    Args:
        groups: in which a model's collectives run.
        ranks: of all processes that take part in them.
        device: of the model.
    """

    def __init__(self, groups: list[Any], ranks: list[int], device: torch.device) -> None:
        self._groups = groups
        self._timeout = 2 * max(_timeout(group, device) for group in groups)  # what waits there gives up sooner
        self._group = meet("votes", tuple(sorted(ranks)), self._timeout)

    def issued(self) -> int:
        """How many collectives this process has begun in the model's groups."""
        try:
            return sum(int(group._get_sequence_number_for_group()) for group in self._groups)
        except RuntimeError:  # a backend that does not count
            return 0

    def cast(self, said: int, step: int, issued: int, place: int | None, haste: bool) -> Count:
        """Vote, without waiting. Two processes agree in a number if its least and the least of its negative do.

        A process that exits waits for its votes: one that fails, and may exit for it, does so in `haste`.
        """
        places = [NEUTRAL, NEUTRAL] if place is None else [place, -place]
        vote = (said << SHIFT) + (0 if said == FINE else dist.get_rank())
        votes = torch.tensor([vote, step, -step, issued, -issued, *places], device="cpu")
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment, unused-ignore]
        options.timeout = min(HASTE, self._timeout) if haste else self._timeout
        return Count(self._group.allreduce([votes], options), votes)


def _timeout(group: Any, device: torch.device) -> dt.timedelta:
    timeout: dt.timedelta = group._get_backend(device).options._timeout
    return timeout


def meet(purpose: str, ranks: tuple[int, ...], timeout: dt.timedelta | None = None) -> Any:
    """The gloo group of these ranks. Where it is made, every one of them must be."""
    group = _groups.get((purpose, ranks))
    if group is None or not _lives(group):
        group = dist.new_group(list(ranks), timeout=timeout, backend="gloo", use_local_synchronization=True)
        _groups[purpose, ranks] = group
    return group


def _lives(group: Any) -> bool:
    """Whether nobody has called `destroy_process_group` since."""
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError):
        return False
    return True
