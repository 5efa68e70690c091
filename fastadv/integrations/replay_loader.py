"""A loader that repeats the batches of another, for a Trainer: it can be skipped into, and knows its length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from fastadv.methods import repeat


class _Replayed(IterableDataset[Any]):
    """A loader's batches, each group of them several times in a row, as a data set: what skips batches of a loader when
    training resumes looks at its data set.
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
        """Batches that do not fill a group are left out: their replays would share an optimizer step."""
        return None if self._groups is None else self._groups * self.group * self.replays

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)


class ReplayLoader(DataLoader[Any]):
    """A loader of batches that another has loaded and placed."""

    def __init__(self, loader: Any, replays: int, group: int) -> None:
        super().__init__(_Replayed(loader, replays, group), batch_size=None, collate_fn=_as_it_is)

    dataset: _Replayed


def _as_it_is(batch: Any) -> Any:
    return batch
