"""The batches of a loader, each several times in a row: what FreeAT trains on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

from fastadv.methods.options import whole

Batch = TypeVar("Batch")


class Repeated(Generic[Batch]):
    """A loader whose batches come several times in a row; all else (its sampler, its data set) is the loader's."""

    def __init__(self, loader: Iterable[Batch], replays: int, group: int) -> None:
        self.loader = loader
        self.replays = replays
        self.group = group

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self.loader)
        while group := list(islice(batches, self.group)):
            for _ in range(self.replays):
                yield from group

    def __len__(self) -> int:
        return self.replays * len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.__dict__["loader"], name)


def repeat(loader: Iterable[Batch], replays: int, group: int = 1) -> Repeated[Batch]:
    """Every batch of `loader`, `replays` times in a row: one epoch of it is as long as `replays` plain ones.

    Each batch is loaded once: the replays see the same tensors.

    Args:
        loader: any iterable of batches; with a length if `len()` is to be asked for.
        replays: how often each batch comes, `adv.replays`.
        group: batches that one optimizer step accumulates: a, b, a, b for a group of two. Pass the number of the
            optimizer step to `FreeAT.backward` then.

    Raises:
        TypeError, ValueError: `replays` or `group` is no whole number of at least 1.

    Examples:
        >>> list(repeat(["a", "b"], 2)), list(repeat(["a", "b"], 2, group=2))
        (['a', 'a', 'b', 'b'], ['a', 'b', 'a', 'b'])
    """
    return Repeated(loader, whole("replays", replays, 1), whole("group", group, 1))
