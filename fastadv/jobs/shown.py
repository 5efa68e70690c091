"""Make text visible: what a file, a folder or a label is called must not move a terminal or reorder a line."""

from __future__ import annotations

import re

# Control characters of both sets, line and paragraph separators, what turns the direction of writing, half characters.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
HALF = re.compile("[\ud800-\udfff]")  # half a character, which no tokenizer takes and no file can hold
_IN_JSON = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    r"""Spell what cannot be seen as Python does, on one line.

    >>> visible("red \x1b[31m")
    'red \\x1b[31m'
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def visible_json(text: str) -> str:
    r"""Spell it in a JSON text as JSON does, so that it reads back the same: `json.dumps` leaves some as they are."""
    return _IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def say(*lines: object) -> None:
    """Print lines on standard output, each visible."""
    for line in lines:
        print(visible(line))
