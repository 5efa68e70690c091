"""The batches of a rank, step by step, by the contract of torchdata's StatefulDataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fastadv.jobs.errors import UserError
from fastadv.pretrain.masking import IGNORED, Masking
from fastadv.pretrain.prefetch import ahead
from fastadv.pretrain.rows import Row
from fastadv.pretrain.settings import Settings
from fastadv.pretrain.stream import StreamRows, merged

AHEAD = 2  # steps


class Batch(NamedTuple):
    """Hold b rows of T tokens, int64 each.

    Attributes:
        ids: [b, T], what the model sees.
        labels: [b, T], aligned with `ids`; -100: nothing to tell. Causal: the tokens themselves (the model shifts
            them), but not the first of a piece, which follows from nothing. Masked: the tokens that were chosen.
        positions: [b, T], from 0 on in each document's piece.
        groups: [b, T], the number of a token's piece in its row, from 0 on.
        rows: [b], the rows' numbers, counted through all steps and ranks.
    """

    ids: Tensor
    labels: Tensor
    positions: Tensor
    groups: Tensor
    rows: Tensor

    def pinned(self) -> Batch:
        """Copy to memory that a GPU reads by itself."""
        return Batch(*(one.pin_memory() for one in self))


class Source(Protocol):
    """Make rows by their numbers: `rows.Rows`, `stream.StreamRows`."""

    def row(self, number: int) -> Row: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def batch(source: Source, numbers: Sequence[int], masking: Masking | None) -> Batch:
    """Make a batch of rows. `masking`: of a masked language model; None: of a causal one."""
    rows = [source.row(number) for number in numbers]
    ids, positions, groups = (np.stack(columns) for columns in zip(*rows, strict=True))
    if masking is None:
        labels = np.where(positions == 0, IGNORED, ids)
    else:
        pairs = [masking(row.ids, number) for row, number in zip(rows, numbers, strict=True)]
        ids, labels = (np.stack(columns) for columns in zip(*pairs, strict=True))
    made = (ids, labels, positions, groups, np.array(numbers, np.int64))
    return Batch(*(torch.from_numpy(one) for one in made))


def rows_per_step(settings: Settings, world: int = 1) -> int:
    """Return the rows of an optimizer step, over all ranks: `batch_tokens // length`.

    Raises:
        UserError: a step holds no row, or its rows are no multiple of the ranks.
    """
    rows = settings.batch_tokens // settings.length
    if rows < 1:
        raise UserError(f"--batch-tokens {settings.batch_tokens} holds no row of --length {settings.length} tokens")
    if rows % world:
        fit = [str(number) for number in range(1, rows + 1) if rows % number == 0]
        raise UserError(
            f"{world} processes cannot share the {rows} rows of a step: start {_either(fit)}, or give --batch-tokens "
            f"{-(-rows // world) * world * settings.length}"
        )
    return rows


def _either(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


class Loader:
    """Give this rank's micro-batches of each optimizer step, endlessly.

    Step s of R rows has the rows s * R to (s + 1) * R - 1. The k-th of them is rank k mod world's, which cuts its rows
    into micro-batches of `settings.micro_batch`. Every iteration goes on where the state says.

    Args:
        source: of the rows.
        settings: `batch_tokens`, `length`, `micro_batch`.
        masking: of a masked language model.
        rank: of this process among `world`.
        device: of the model: batches for a GPU wait in pinned memory, where their tokens are counted without a sync.

    Raises:
        UserError: as `rows_per_step`.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        masking: Masking | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.masking = source, masking
        self.rank, self.world, self.device = rank, world, torch.device(device)
        self.step_rows, self.micro_batch = rows_per_step(settings, world), settings.micro_batch
        self._state: dict[str, Any] = {"rows": 0, "source": source.state_dict()}

    def __iter__(self) -> Iterator[list[Batch]]:
        self.source.load_state_dict(self._state["source"])
        steps = self._steps(self._state["rows"])
        pays = isinstance(self.source, StreamRows) or self.device.type == "cuda"
        for batches, self._state in ahead(steps, AHEAD) if pays else steps:
            yield batches

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the last step that was given: JSON, and the same on each rank of any number of them.

        Of a text that is streamed every rank knows its own streams: then all ranks must call this together.
        """
        source = self._state["source"]
        if isinstance(self.source, StreamRows) and self.world > 1:
            states: list[Any] = [None] * self.world
            dist.all_gather_object(states, source)
            source = merged(states)
        return {"rows": self._state["rows"], "source": source}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, from the next iteration on, at the place that a loader of any number of ranks was at."""
        self.source.load_state_dict(state["source"])
        self._state = {"rows": int(state["rows"]), "source": self.source.state_dict()}

    def _steps(self, done: int) -> Iterator[tuple[list[Batch], dict[str, Any]]]:
        """Make the steps from row `done` on, each with the state after it."""
        while True:
            mine = range(done + self.rank, done + self.step_rows, self.world)
            cuts = [mine[start : start + self.micro_batch] for start in range(0, len(mine), self.micro_batch)]
            made = [batch(self.source, cut, self.masking) for cut in cuts]
            done += self.step_rows
            if self.device.type == "cuda":
                made = [one.pinned() for one in made]
            yield made, {"rows": done, "source": self.source.state_dict()}
