"""Rows of a text that is read by streaming: data sets too large to be tokenised first.

The text is read in P parts, and its rows come from S streams, S a multiple of P. Of part p, document j belongs to
stream p + P * (j mod S/P); with one part that is document i to stream i mod S. Row r comes from stream r mod S, which
cuts its documents into rows as they come. So the rows depend on S and P, and not on who makes them: a rank reads the
parts of its own streams and tokenises the documents of its own streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, Protocol

import numpy as np

from fastadv.jobs.errors import UserError
from fastadv.pretrain.rows import Ints, Row, packed
from fastadv.pretrain.source import Text

EVERY = 64  # documents between two places of a part to which a resumed training can go back

Encode = Callable[[str], Sequence[int]]  # the tokens of a document with its end token; none of one without text


class Part(Protocol):
    """Give documents in the same order each time; `state_dict` says how far the last iteration has come."""

    def __iter__(self) -> Iterator[str]: ...

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


class Stream(Protocol):
    """Open a text that is read in parts."""

    @property
    def what(self) -> str: ...

    def parts(self, streams: int) -> int:
        """Choose the number of parts for so many streams, which it divides."""
        ...

    def part(self, number: int, parts: int) -> Part:
        """Open part `number` of so many at its beginning."""
        ...

    def documents(self) -> Iterator[str]:
        """Give all documents once, to train a tokenizer on the first of them."""
        ...


class Counted:
    """Make a part of any function that gives documents: to go back to a place, those before it are read again."""

    def __init__(self, read: Callable[[], Iterator[str]]) -> None:
        self.read, self.done = read, 0

    def __iter__(self) -> Iterator[str]:
        for document in islice(self.read(), self.done, None):
            self.done += 1
            yield document

    def state_dict(self) -> int:
        return self.done

    def load_state_dict(self, state: int) -> None:
        self.done = state


class OnePart:
    """Read any text as one part."""

    def __init__(self, text: Text) -> None:
        self.text, self.what, self.documents = text, text.what, text.documents

    def parts(self, streams: int) -> int:  # noqa: ARG002 - of a text in several parts it counts
        return 1

    def part(self, number: int, parts: int) -> Part:  # noqa: ARG002 - there is one
        return Counted(self.text.read)


class _Place(NamedTuple):
    """A place to read a part on from: before document `number`, counted through all passes."""

    number: int
    state: Any  # of the part; None: at its beginning


class _Reader:
    """Read one part over and over, and put its documents into the queues of the streams that are wanted."""

    def __init__(
        self, open_part: Callable[[], Part], encode: Encode, width: int, queues: dict[int, _Queue], place: _Place
    ) -> None:
        self.open_part, self.encode, self.width, self.queues = open_part, encode, width, queues
        self.number = place.number
        self.places = deque([place])
        self.part = open_part()
        if place.state is not None:
            self.part.load_state_dict(place.state)
        self.documents = iter(self.part)

    def fill(self, queue: _Queue) -> None:
        """Read on until a queue has a document.

        Raises:
            UserError: a pass for each stream gave it none.
        """
        passes = 0
        while not queue.waiting:
            document = next(self.documents, None)
            if document is None:
                passes += self.number >= queue.number  # before that, a resumed reading is on its way there
                if passes > self.width + 1:
                    raise UserError("the text has a stream without a token: give more text, or fewer --batch-tokens")
                self.part = self.open_part()
                self.documents = iter(self.part)
                self._note(None)
                continue
            self._take(document)

    def _take(self, document: str) -> None:
        wanted = self.queues.get(self.number % self.width)
        if wanted is not None and self.number >= wanted.number:
            ids = self.encode(document)
            if len(ids):
                wanted.waiting.append((self.number, np.asarray(ids, dtype=np.int64)))
        self.number += 1
        if self.number % EVERY == 0:
            self._note(self.part.state_dict())

    def _note(self, state: Any) -> None:
        self.places.append(_Place(self.number, state))
        self.place()

    def place(self) -> _Place:
        """Return the last place from which nothing that the streams still need is missed; forget those before it."""
        needed = min(queue.number for queue in self.queues.values())
        while len(self.places) > 1 and self.places[1].number <= needed:
            self.places.popleft()
        return self.places[0]


class _Queue:
    """The documents of a stream that wait to be cut into rows."""

    def __init__(self, number: int, offset: int) -> None:
        self.number, self.offset = number, offset  # of the next token: its document, and where in it
        self.waiting: deque[tuple[int, Ints]] = deque()

    def piece(self, most: int) -> Ints:
        """Take at most so many tokens of the first document."""
        number, ids = self.waiting[0]
        if number != self.number:
            self.number, self.offset = number, 0
        piece = ids[self.offset : self.offset + most]
        self.offset += len(piece)
        if self.offset >= len(ids):
            self.waiting.popleft()
            self.number, self.offset = number + 1, 0
        return piece


class StreamRows:
    """Cut a stream of documents into rows. The rows of a stream are made in their order.

    Args:
        text: read in P parts, as it says.
        streams: their number S.
        mine: the streams whose rows are asked for here.
        encode: tokenises a document.
        length: tokens of a row.
    """

    def __init__(self, text: Stream, streams: int, mine: Sequence[int], encode: Encode, length: int) -> None:
        self.text, self.streams, self.mine = text, streams, mine
        self.parts, self.encode, self.length = text.parts(streams), encode, length
        self._readers: dict[int, _Reader] = {}
        self._places: dict[int, _Place] = {}
        self._queues: dict[int, _Queue] = {}
        self.load_state_dict({})

    def row(self, number: int) -> Row:
        """Make row `number`, the next one of its stream."""
        stream, missing = number % self.streams, self.length
        reader, queue = self._reader(stream % self.parts), self._queues[stream]
        pieces: list[Ints] = []
        while missing:
            reader.fill(queue)
            pieces.append(queue.piece(missing))
            missing -= len(pieces[-1])
        return packed(pieces)

    def state_dict(self) -> dict[str, Any]:
        """Return where these streams and their parts are: JSON. `merged` puts those of all ranks together."""
        return {
            "of": [self.streams, self.parts],
            "streams": [[stream, queue.number, queue.offset] for stream, queue in self._queues.items()],
            "parts": [
                [part, *(self._readers[part].place() if part in self._readers else place)]
                for part, place in self._places.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the places of a state of all ranks; {}: to the beginning.

        Raises:
            UserError: the state is of another number of streams or parts.
        """
        if state and state["of"] != [self.streams, self.parts]:
            raise UserError(
                "the place in a streamed text is kept by row of a step, and the text's number of files counts too: "
                "go on with the --batch-tokens, --length and --data of before"
            )
        streams = {stream: places for stream, *places in state.get("streams", [])}
        parts = {part: _Place(*place) for part, *place in state.get("parts", [])}
        self._queues = {stream: _Queue(*streams.get(stream, (0, 0))) for stream in self.mine}
        self._places = {part: parts.get(part, _Place(0, None)) for part in {one % self.parts for one in self.mine}}
        self._readers = {}

    def _reader(self, part: int) -> _Reader:
        """Open a part when its first row is asked for."""
        if part not in self._readers:
            queues = {one // self.parts: queue for one, queue in self._queues.items() if one % self.parts == part}
            width, place = self.streams // self.parts, self._places[part]
            self._readers[part] = _Reader(lambda: self.text.part(part, self.parts), self.encode, width, queues, place)
        return self._readers[part]


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the states of all ranks together: of a part that several read, the place that is furthest behind."""
    parts: dict[int, list[Any]] = {}
    for found in (one for state in states for one in state["parts"]):
        part, number, _ = found
        if part not in parts or number < parts[part][1]:
            parts[part] = found
    return {
        "of": states[0]["of"],
        "streams": sorted(one for state in states for one in state["streams"]),
        "parts": [parts[part] for part in sorted(parts)],
    }
