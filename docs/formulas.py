"""Formulas as MathML, which browsers show by themselves: no script, no network."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

DOCSTRING = re.compile(r"<p>\.\. math::(.*?)</p>", re.DOTALL)
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)
OPENING = re.compile(r"\\[bB]ig(?=[(\[]|\\[{]|\\l(?:vert|Vert|angle))")
WORD = re.compile(r"_\{([a-z]{2,})\}")
CLOSING = re.compile(r"\\[bB]ig(?=[)\]]|\\[}]|\\r(?:vert|Vert|angle))")


def on_page_content(content: str, **_: Any) -> str:
    """MkDocs calls this with every page."""
    return DOCSTRING.sub(lambda found: _block(found[1]), FORMULA.sub(_formula, content))


def _formula(found: re.Match[str]) -> str:
    return _block(found[2]) if found[1] == "div" else _mathml(found[2], "inline")


def _block(source: str) -> str:
    """Formulas that `\\qquad` sets side by side: where the page is narrow, one below the other."""
    parts = "".join(f"<div>{_mathml(part, 'block')}</div>" for part in re.split(r",?\s*\\qquad", source))
    return f'<div class="formulas">{parts}</div>'


def _mathml(source: str, display: str) -> str:
    source = html.unescape(re.sub(r"<[^>]+>", "", source)).strip()
    stretched = CLOSING.sub(r"\\right", OPENING.sub(r"\\left", source))
    return str(convert(WORD.sub(r"_{\\mathrm{\1}}", stretched), display=display))
