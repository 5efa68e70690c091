"""What text comes from: a name to show, a fingerprint, and its documents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from fastadv.jobs.shown import HALF


class Text(NamedTuple):
    """Hold a source of documents.

    Attributes:
        what: its name, for one line that says where the text is from.
        fingerprint: another one where the text is another.
        read: gives the documents, in the same order each time.
    """

    what: str
    fingerprint: str
    read: Callable[[], Iterator[str]]

    def documents(self) -> Iterator[str]:
        """Give the documents that hold text, as `clean` does."""
        return clean(self.read())


def clean(documents: Iterable[str]) -> Iterator[str]:
    r"""Leave out documents of white space alone, and put U+FFFD in place of half a character.

    JSON can spell half of a surrogate pair. No tokenizer takes it, and one broken page must not end a training on
    millions.

    >>> list(clean(["a", "  ", "half: \ud83d"]))
    ['a', 'half: �']
    """
    for document in documents:
        if document.strip():
            yield document if document.isascii() else HALF.sub("\ufffd", document)
