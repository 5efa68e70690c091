"""What one process does for all, and what all do a part of."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fastadv.jobs.errors import UserError
from fastadv.pretrain.processes import Processes

T = TypeVar("T")
PATIENCE = dt.timedelta(days=1)


def first_alone(processes: Processes, work: Callable[[], T]) -> T:
    """Let the first process do `work` and tell the others what came of it.

    Raises:
        UserError: what `work` found wrong. The first process says it; the others end without a word.
    """
    found: tuple[Any, str | None] = None, None
    if processes.first:
        try:
            found = work(), None
        except UserError as error:
            found = None, str(error)
    value, wrong = found if processes.world == 1 else _told(found)
    if wrong is None:
        return value  # type: ignore[no-any-return]
    if processes.first:
        raise UserError(wrong)
    raise SystemExit(2)


def _told(value: Any) -> Any:
    """Hear what the first process has, however long it takes: tokenising a large text takes longer than a step may."""
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    box = [value]
    dist.broadcast_object_list(box, group=group, device=torch.device("cpu"))
    dist.destroy_process_group(group)
    return box[0]


def gathered(processes: Processes, mine: Sequence[T]) -> list[T]:
    """Put the parts of all processes together, of which each had every `world`-th item."""
    if processes.world == 1:
        return list(mine)
    parts: list[Any] = [None] * processes.world
    dist.all_gather_object(parts, list(mine))
    whole = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: processes.world] = part
    return whole  # type: ignore[return-value]


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Gather a sharded model's weights on the first process's CPU; the others get none."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
