"""Put the tokens of a text together to words, as a reader sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Word(NamedTuple):
    """Hold a word and the tokens that spell it: `start` to `end`, the last not included."""

    text: str
    start: int
    end: int
    special: bool


def words_of(tokenizer: Any, ids: Sequence[int]) -> list[Word]:
    """Group tokens: pieces that continue a word go to it, and a special token stands alone."""
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    special = set(tokenizer.all_special_ids)
    starts = [
        index
        for index, token in enumerate(tokens)
        if index == 0 or ids[index] in special or ids[index - 1] in special or not _continues(tokens, index)
    ]
    spans = zip(starts, [*starts[1:], len(ids)], strict=True)
    return [
        Word(tokenizer.decode(ids[start:end]).strip() or tokens[start], start, end, ids[start] in special)
        for start, end in spans
    ]


def _continues(tokens: Sequence[str], index: int) -> bool:
    """WordPiece marks the pieces that continue a word; SentencePiece and byte-level BPE those that begin one."""
    if any(token.startswith(("Ġ", "▁")) for token in tokens):
        return not tokens[index].startswith(("Ġ", "▁"))
    return tokens[index].startswith("##")
