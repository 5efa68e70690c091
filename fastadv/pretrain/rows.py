"""Rows of packed documents: row r of a corpus is a function of the seed and r alone, so that any rank can make it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastadv.jobs.errors import UserError
from fastadv.pretrain.corpus import Corpus
from fastadv.pretrain.keyed import Purpose, numbers

Ints = NDArray[np.int64]


class Row(NamedTuple):
    """Hold a row of T tokens, int64 each.

    Attributes:
        ids: [T], pieces of documents one after another.
        positions: [T], from 0 on in each piece.
        groups: [T], the number of each token's piece in the row, from 0 on: `groups=` of the methods.
    """

    ids: Ints
    positions: Ints
    groups: Ints


def packed(pieces: Sequence[NDArray[Any]]) -> Row:
    """Put pieces of documents one after another.

    >>> packed([np.array([5, 6, 0]), np.array([7])]).positions
    array([0, 1, 2, 0])
    """
    sizes = [len(piece) for piece in pieces]
    starts = np.cumsum([0, *sizes[:-1]])
    return Row(
        np.concatenate(pieces, dtype=np.int64),
        np.arange(sum(sizes)) - np.repeat(starts, sizes),
        np.repeat(np.arange(len(sizes)), sizes),
    )


class _Epoch(NamedTuple):
    order: Ints  # the documents in their order
    ends: Ints  # where each of them ends, among the epoch's tokens


class Rows:
    """Cut a corpus into rows.

    The documents follow one another, each once an epoch, in an order of its own for each epoch; the epochs follow one
    another too, and rows of `length` tokens are cut from that endless line. No token is left out or padded: a row can
    hold the end of one epoch and the beginning of the next, and row r begins `r * length` tokens into the line.

    Args:
        corpus: the tokens.
        documents: the numbers of those documents that count.
        length: tokens of a row.
        seed: of the orders.

    Raises:
        UserError: there is no document.
    """

    def __init__(self, corpus: Corpus, documents: Ints, length: int, seed: int) -> None:
        if not len(documents):
            raise UserError("there is no document to make rows of: give more text with --data or --eval-data")
        self.corpus, self.documents, self.length, self.seed = corpus, documents, length, seed
        self._sizes = np.diff(corpus.bounds)[documents]
        self.tokens = int(self._sizes.sum())
        self._epochs: dict[int, _Epoch] = {}

    def row(self, number: int) -> Row:
        """Make row `number`."""
        place, missing, pieces = number * self.length, self.length, []
        while missing:
            piece = self._piece(*divmod(place, self.tokens))[:missing]
            pieces.append(piece)
            place, missing = place + len(piece), missing - len(piece)
        return packed(pieces)

    def _piece(self, epoch: int, place: int) -> NDArray[Any]:
        """Return what follows in the document at a place of an epoch."""
        order, ends = self._of(epoch)
        number = int(ends.searchsorted(place, side="right"))
        end = self.corpus.bounds[order[number] + 1]
        return self.corpus.tokens[end - (ends[number] - place) : end]

    def _of(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a row between two epochs needs both
                del self._epochs[min(self._epochs)]
            chosen = numbers(self.seed, Purpose.ORDER, epoch, len(self.documents)).argsort(kind="stable")
            self._epochs[epoch] = _Epoch(self.documents[chosen], self._sizes[chosen].cumsum())
        return self._epochs[epoch]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a row's number is all that it follows from."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""
