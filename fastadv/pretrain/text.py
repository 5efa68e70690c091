"""Find the text that a pretraining reads."""

from __future__ import annotations

from pathlib import Path

from fastadv.jobs.errors import UserError
from fastadv.jobs.hub import is_saved
from fastadv.pretrain.default_text import DEFAULT, default_text
from fastadv.pretrain.hub import HubStream, hub_text
from fastadv.pretrain.source import Text
from fastadv.pretrain.stream import OnePart, Stream
from fastadv.pretrain.text_files import file_text, is_files


def find(data: str, column: str) -> Text:
    """Find a source by its name: the default text, files and folders, or a data set of the hub.

    Raises:
        UserError: there is no such text; it says what to do.
    """
    if not data.strip():
        raise UserError("--data is empty: give files, a folder or a data set's name, or leave it out")
    if is_default(data):
        return default_text()
    return hub_text(data, column) if is_data_set(data) else file_text(data, column)


def stream(data: str, column: str) -> Stream:
    """Find a source by its name, to be read by streaming: nothing of it is kept.

    Raises:
        UserError: as `find`.
    """
    return HubStream(data, column) if is_data_set(data) else OnePart(find(data, column))


def is_default(data: str) -> bool:
    """Tell whether the default text is meant."""
    return data == DEFAULT and not Path(data).exists()


def is_data_set(data: str) -> bool:
    """Tell whether the package `datasets` is to read it: of the hub, or of a folder that its `save_to_disk` wrote."""
    return not is_default(data) and (is_saved(data) or not is_files(data))
