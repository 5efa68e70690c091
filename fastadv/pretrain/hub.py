"""Data sets of the hub, and folders that `datasets` wrote, through the package `datasets`."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from typing import Any

from fastadv.jobs.errors import UserError, loading
from fastadv.jobs.hub import is_saved, named
from fastadv.pretrain.source import Text, clean
from fastadv.pretrain.text_files import ENDINGS, text_of


def hub_text(name: str, column: str) -> Text:
    """Load the split `train` of NAME or NAME:CONFIG, whole.

    Raises:
        UserError: `datasets` is not installed, or finds no such data set.
    """
    loaded = _load(name, streaming=False)

    def documents() -> Iterator[str]:
        for number, row in enumerate(loaded):
            yield text_of(row, column, f"{name}, row {number}")

    return Text(f"the data set {name}", f"hub {name} {column} {loaded.num_rows}", documents)


ALIKE = 16  # files a part, where some parts have one more than others


class HubPart:
    """Read a part of a data set by streaming: some of its files. What `IterableDataset` knows of its place is kept."""

    def __init__(self, loaded: Any, name: str, column: str) -> None:
        self.loaded, self.name, self.column = loaded, name, column

    def __iter__(self) -> Iterator[str]:
        advice = "see that the hub can be reached; --resume goes on at the last checkpoint"
        with loading(f"the data set {self.name} could not be read further", advice):
            for row in self.loaded:
                yield text_of(row, self.column, self.name)

    def state_dict(self) -> Any:
        return copy.deepcopy(self.loaded.state_dict())

    def load_state_dict(self, state: Any) -> None:
        self.loaded.load_state_dict(copy.deepcopy(state))


class HubStream:
    """Open a data set by streaming, in parts of whole files.

    Raises:
        UserError: `datasets` is not installed, or finds no such data set.
    """

    def __init__(self, name: str, column: str) -> None:
        self.name, self.column, self.what = name, column, f"the data set {name}, streamed"
        self.files = int(_load(name, streaming=True).num_shards)

    def parts(self, streams: int) -> int:
        """Choose into how many parts so many streams read it: as many as differ by a sixteenth in files at most."""
        return next(
            parts
            for parts in range(min(streams, self.files), 0, -1)
            if streams % parts == 0 and (self.files % parts == 0 or self.files >= ALIKE * parts)
        )

    def part(self, number: int, parts: int) -> HubPart:
        """Open part `number` of `parts`, at most `files`, at its beginning."""
        loaded = _load(self.name, streaming=True)  # anew: an IterableDataset goes on from the state it was given last
        return HubPart(loaded.shard(num_shards=parts, index=number, contiguous=False), self.name, self.column)

    def documents(self) -> Iterator[str]:
        """Give all documents that hold text."""
        return clean(self.part(0, 1))


def _load(name: str, *, streaming: bool) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{name} is no file or folder with text ({', '.join(ENDINGS)}), and data sets of the hub need a package: "
            "pip install datasets"
        )
    import datasets

    datasets.disable_progress_bars()
    path, config = named(name)
    with loading(f"the data set {name} could not be loaded", "give files, a folder, or the name of a data set"):
        if is_saved(name):
            saved = datasets.load_from_disk(name)
            whole = saved["train"] if isinstance(saved, dict) else saved
            return whole.to_iterable_dataset() if streaming else whole
        return datasets.load_dataset(path, config, split="train", streaming=streaming, trust_remote_code=False)
