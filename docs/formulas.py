"""Formulas as MathML, which browsers show by themselves: no script, no network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

DOCSTRING = re.compile(r"<p>\.\. math::(.*?)</p>", re.DOTALL)
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with every page."""
    return DOCSTRING.sub(lambda found: _mathml(found[1], "block"), FORMULA.sub(_formula, content))


def _formula(found: re.Match[str]) -> str:
    return _mathml(found[2], "block" if found[1] == "div" else "inline")


def _mathml(source: str, display: str) -> str:
    source = html.unescape(re.sub(r"<[^>]+>", "", source))
    return str(convert(re.sub(r"\\[bB]ig(?![a-z])", "", source), display=display))  # MathML stretches by itself
