"""Compose HTML: the pieces of a page that needs no other file, for a desk and for a phone."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from typing import Any

from fastadv.jobs.shown import visible

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: #111827;
  background: #fff; max-width: 64rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; font-weight: 600; }
p { margin: .5rem 0; max-width: 48rem; } .quiet { color: #4b5563; }
.verdict { border-left: 4px solid #1d5fbf; padding: .25rem 0 .25rem 1rem; margin: 1.25rem 0; font-size: 1.08rem; }
.warnings { border-left: 4px solid #b91c1c; background: #fef2f2; padding: .5rem 1rem; margin: 1.25rem 0; }
.verdict p, .warnings p { margin: .3rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid #e5e7eb; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
thead th { border-bottom: 2px solid #9ca3af; font-weight: 600; }
tbody th { font-weight: 400; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { color: #4b5563; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.25rem; margin: 0; font-size: .93rem; }
dt { color: #4b5563; } dd { margin: 0; overflow-wrap: anywhere; }
pre { background: #f3f4f6; padding: .75rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; border-radius: 4px;
  font-size: .88rem; }
.sample { border-top: 1px solid #e5e7eb; padding: 1rem 0; }
.moved { line-height: 1.9; margin: .1rem 0 .6rem; overflow-wrap: anywhere; }
.moved span { padding: .1rem .15rem; border-radius: 3px; } .special { color: #6b7280; font-size: .8em; }
.turned { color: #b91c1c; font-weight: 600; }
@media (max-width: 44rem) {
  body { margin: 1.25rem auto; padding: 0 1rem; }
  thead { position: absolute; left: -9999px; }
  table, tbody, tr, th, td { display: block; width: 100%; }
  tbody tr { border-bottom: 1px solid #9ca3af; padding: .5rem 0; }
  tbody th, td { border: 0; padding: .1rem 0; white-space: normal; }
  tbody th { font-weight: 600; }
  td { display: flex; justify-content: space-between; gap: 1rem; }
  td::before { content: attr(data-of); color: #4b5563; }
  dl { display: block; } dt { margin-top: .5rem; }
}
@media print { body { margin: 0; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """Put the parts of a body into a page."""
    head = (
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{text(title)}</title><style>{CSS}</style></head><body>'
    )
    return "\n".join(["<!doctype html>", head, *parts, "</body></html>"]) + "\n"


def paragraph(content: str, kind: str = "") -> str:
    """Write a paragraph of plain text. `kind`: its class."""
    return f'<p class="{kind}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>"


def box(sentences: Iterable[str], kind: str) -> str:
    """Set sentences apart, each on a line of its own; no sentences, no box."""
    found = "".join(paragraph(sentence) for sentence in sentences)
    return f'<div class="{kind}">{found}</div>' if found else ""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table. On a phone every row stands by itself, and each cell says which column it is of."""
    head = "".join(f'<th scope="col">{text(heading)}</th>' for heading in headings)
    body = "".join(_row(headings, row) for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _row(headings: Sequence[str], row: Sequence[str]) -> str:
    cells = (f'<td data-of="{text(of)}">{text(cell)}</td>' for of, cell in zip(headings[1:], row[1:], strict=True))
    return f'<tr><th scope="row">{text(row[0])}</th>{"".join(cells)}</tr>'


def figure(svg: str, caption: str) -> str:
    """Put a picture into the page itself."""
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>"


def entries(pairs: Iterable[tuple[str, str]]) -> str:
    """List names and what they stand for."""
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in pairs) + "</dl>"


def text(value: Any) -> str:
    """Escape a string, and spell what cannot be seen; write anything else as JSON."""
    return html.escape(visible(value if isinstance(value, str) else json.dumps(value)))
