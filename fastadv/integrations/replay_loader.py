"""Repeat the batches of a loader for a Trainer, which must know its length and skip batches when it resumes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from fastadv.methods import repeat


class _Replayed(IterableDataset[Any]):
    """Yield a loader's batches, each group several times in a row.

    A data set, since accelerate skips batches of a loader's data set when training resumes.
    """

    def __init__(self, loader: Any, replays: int, group: int) -> None:
        self.loader = loader
        self.replays = replays
        self.group = group
        try:
            self._groups: int | None = len(loader) // group
        except TypeError:  # an iterable data set
            self._groups = None
        if self._groups == 0:
            raise ValueError(
                f"gradient_accumulation_steps={group}, but an epoch has {len(loader)} batches: lower it, or batches "
                "cannot be replayed in groups"
            )

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(repeat(self.loader, self.replays, self.group)), self._batches())

    def __len__(self) -> int:
        batches = self._batches()
        if batches is None:
            raise TypeError("the loader has no length")
        return batches

    def _batches(self) -> int | None:
        """Count the batches. Those that fill no group are left out: their replays would share an optimizer step."""
        return None if self._groups is None else self._groups * self.group * self.replays

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)


class ReplayLoader(DataLoader[Any]):
    """Load batches that another loader has collated and moved to the device."""

    def __init__(self, loader: Any, replays: int, group: int) -> None:
        super().__init__(_Replayed(loader, replays, group), batch_size=None, collate_fn=_as_it_is)

    dataset: _Replayed


def _as_it_is(batch: Any) -> Any:
    return batch
