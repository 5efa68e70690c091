"""Keep a run of the default job, as its page shows it: `python examples/pretrain_results.py runs/pretrain/DATE-TIME`.

Writes docs/results/pretrain.json and .svg, and the part of docs/pretraining.md that follows from them.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastadv.jobs.log import read_log
from fastadv.pretrain import plots, tables, verdict

DOCS = Path(__file__).parents[1] / "docs"
RESULT, PICTURE, PAGE = DOCS / "results/pretrain.json", DOCS / "results/pretrain.svg", DOCS / "pretraining.md"
BEGIN, END = "<!-- the default job: from here on by examples/pretrain_results.py -->", "<!-- to here -->"


def section(result: Mapping[str, Any]) -> str:
    """The part of the page: the command, what was measured, what it took, and the sentences."""
    perplexities = list(_table(tables.headings(result), tables.lines(result)))
    costs = list(_table(["", *tables.columns(result)], tables.costs(result)))
    model, settings = result["model"], result["settings"]
    given = ", ".join(f"{name}={value}" for name, value in settings["method_arguments"].items())
    what = (
        f"`{result['command']}`: {model['class']}, {model['parameters']:,} parameters, {settings['method_name']} with "
        f"{given}; {result['hardware']}."
    )
    return "\n".join([
        BEGIN,
        "",
        *textwrap.wrap(f"{what} {_beside(result)}", 120),
        "",
        "![Training loss by time, and perplexity by the radius of the attack](results/pretrain.svg)",
        "",
        f"{tables.title(result).capitalize()}:",
        "",
        *perplexities,
        "",
        *costs,
        "",
        *_bullets([*verdict.doubts(result), *verdict.sentences(result)]),
        "",
        END,
    ])  # fmt: skip


def _beside(result: Mapping[str, Any]) -> str:
    """What else ran there, where that is more than a little."""
    others = max(one["cost"]["conditions"]["others"] for one in result["trainings"].values())
    return f"Other processes kept up to {others:.1f} cores busy, so that times are rough." if others > 0.25 else ""


def _table(headings: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (["measure", *headings[1:]], ["---"] * len(headings), *rows):
        yield f"| {' | '.join(row)} |"


def _bullets(sentences: list[str]) -> Iterator[str]:
    for sentence in sentences:
        yield from textwrap.wrap(sentence, 120, initial_indent="- ", subsequent_indent="  ")


def main(folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    RESULT.write_text(json.dumps(result) + "\n")
    rows = read_log(folder / "log.jsonl")
    settings = result["settings"]
    drawn = plots.both(rows, result["trainings"], settings["method_name"], settings["attack_steps"])
    PICTURE.write_text(drawn)
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + section(result) + rest.partition(END)[2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
