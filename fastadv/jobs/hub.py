"""What `--data` names that the package `datasets` loads: a set of the hub, a folder, or one that it has written."""

from __future__ import annotations

from pathlib import Path


def is_saved(name: str) -> bool:
    """Tell whether a folder was written by `save_to_disk`."""
    return any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))


def named(name: str) -> tuple[str, str | None]:
    """Read NAME or NAME:CONFIG; a folder that is there is a name as it stands.

    >>> named("wikitext:wikitext-2-v1")
    ('wikitext', 'wikitext-2-v1')
    """
    path, _, config = (name, "", "") if Path(name).exists() else name.partition(":")
    return path, config or None
